"""Which tokens may be drawn, and how often."""

from __future__ import annotations

import pytest
import torch

from megaegpt.config import GenerationConfig
from megaegpt.generation.sampling import Sampler, candidates

CPU = torch.device("cpu")
LOGITS = torch.tensor([[1.0, 3.0, -2.0, 2.5, 0.0, 2.0]])


def _kept(config: GenerationConfig, logits: torch.Tensor = LOGITS) -> set[int]:
    """Ids with a probability above 0."""
    probabilities, ids = candidates(logits, config)
    if ids is None:
        ids = torch.arange(logits.shape[-1]).expand_as(logits)
    return set(ids[probabilities > 0].tolist())


def _draw(config: GenerationConfig, logits: torch.Tensor, times: int) -> torch.Tensor:
    """(times, B) tokens drawn one after the other."""
    sampler = Sampler(config, range(config.seed, config.seed + len(logits)), CPU)
    return torch.stack([sampler.draw(logits) for _ in range(times)])


def test_temperature_0_takes_the_likeliest_token_of_each_row() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9], [1.0, -1.0, 0.0]])
    config = GenerationConfig(temperature=0, top_k=None)
    assert _draw(config, logits, 3).tolist() == [[1, 0]] * 3


@pytest.mark.parametrize("k", [1, 2, 5, 6, 100])
def test_top_k_keeps_exactly_the_k_likeliest(k: int) -> None:
    by_likelihood = LOGITS[0].argsort(descending=True).tolist()
    assert _kept(GenerationConfig(top_k=k)) == set(by_likelihood[:k])


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.3, 0.5, 0.62, 0.8, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_p_keeps_the_fewest_tokens_that_hold_p(p: float, temperature: float) -> None:
    probabilities = (LOGITS[0].double() / temperature).softmax(0)
    fewest, held = set(), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if held >= p:
            break
        fewest.add(token)
        held += probabilities[token].item()
    assert _kept(GenerationConfig(temperature=temperature, top_k=None, top_p=p)) == fewest


def test_top_p_counts_the_probability_left_by_top_k() -> None:
    # The two likeliest have 62 % and 38 % of what top_k=2 leaves, 40 % and 24 % of all.
    assert _kept(GenerationConfig(temperature=1, top_k=2, top_p=0.6)) == {1}
    assert _kept(GenerationConfig(temperature=1, top_k=None, top_p=0.6)) == {1, 3}


@pytest.mark.parametrize("temperature", [1e-38, 1e-44, 1e-50, 5e-324])
def test_a_tiny_temperature_is_greedy_without_overflow(temperature: float) -> None:
    config = GenerationConfig(temperature=temperature, top_k=None)
    assert _draw(config, LOGITS * 1000, 5).flatten().tolist() == [1] * 5


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(temperature=1.3, top_k=None),
        GenerationConfig(temperature=1.0, top_k=4),
        GenerationConfig(temperature=1.0, top_k=None, top_p=0.8),
    ],
    ids=["temperature", "top_k", "top_p"],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(config: GenerationConfig) -> None:
    probabilities, ids = candidates(LOGITS, config)
    expected = torch.zeros(LOGITS.shape[-1])
    expected[torch.arange(6) if ids is None else ids[0]] = probabilities[0]
    expected /= expected.sum()
    times = 4000
    counts = _draw(config, LOGITS, times).flatten().bincount(minlength=6)
    deviation = (counts - times * expected).abs()
    assert (deviation <= 4 * (times * expected * (1 - expected)).sqrt() + 1e-3).all()


def test_a_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    logits = torch.zeros(1, 1000)
    draws = {
        seed: _draw(GenerationConfig(top_k=None, seed=seed), logits, 20).flatten().tolist()
        for seed in (1, 2)
    }
    again = _draw(GenerationConfig(top_k=None, seed=1), logits, 20).flatten().tolist()
    assert again == draws[1] != draws[2]


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator)
    together = _draw(GenerationConfig(seed=7), logits, 10)
    alone = _draw(GenerationConfig(seed=9), logits[2:], 10)
    assert together[:, 2].tolist() == alone[:, 0].tolist()


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _draw(GenerationConfig(), LOGITS, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 40), -torch.inf)
    logits[0, [3, 4]] = torch.tensor([0.0, -0.5])
    for config in (GenerationConfig(top_k=None), GenerationConfig(top_k=30, top_p=0.99)):
        assert set(_draw(config, logits, 200).flatten().tolist()) == {3, 4}
