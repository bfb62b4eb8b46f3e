"""Positions: tables, rotations, and how they count in rows of several texts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megaegpt.config import ModelConfig
from megaegpt.config.model_rules import model_problems
from megaegpt.errors import ConfigError
from megaegpt.model.positions import AddedPositions, sinusoids
from megaegpt.model.segments import document_segments, padding_segments, segment_positions
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.models import BASE, build, tokens_of


def test_sinusoids_are_those_of_the_paper():
    table = sinusoids(torch.arange(7), 6, torch.float64)
    for position in range(7):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


@pytest.mark.parametrize("kind", ["rotary", "none"])
def test_rotary_and_no_positions_add_nothing(kind):
    x = torch.randn(1, 3, 32)
    added = AddedPositions(replace(BASE, positions=kind), 10, ProcessGrid(), std=BASE.init_std)
    assert torch.equal(added(x, torch.arange(3)), x)
    assert not list(added.parameters())


def test_without_positions_the_order_of_the_past_is_invisible_to_one_layer():
    model = build(replace(BASE, positions="none", num_layers=1))
    tokens = tokens_of(BASE, 1, 8)
    swapped = tokens[:, [2, 0, 1, 3, 4, 6, 5, 7]]
    last = [model.hidden_states(x)[:, -1] for x in (tokens, swapped)]
    torch.testing.assert_close(*last, rtol=1e-9, atol=1e-9)
    learned = build(replace(BASE, num_layers=1))
    last = [learned.hidden_states(x)[:, -1] for x in (tokens, swapped)]
    assert not torch.allclose(*last)


def test_a_text_longer_than_the_learned_positions_is_refused():
    model = build(BASE)
    model.hidden_states(tokens_of(BASE, 1, BASE.max_seq_len))
    with pytest.raises(ConfigError, match=r"a text of 49 tokens .* model.max_seq_len=48"):
        model.hidden_states(tokens_of(BASE, 1, BASE.max_seq_len + 1))


def test_padding_takes_no_learned_positions():
    model = build(BASE)
    tokens = tokens_of(BASE, 1, BASE.max_seq_len + 5)
    real = torch.arange(BASE.max_seq_len + 5).unsqueeze(0) >= 5
    torch.testing.assert_close(
        model.hidden_states(tokens, segments=padding_segments(real))[:, 5:],
        model.hidden_states(tokens[:, 5:]),
    )


def test_positions_count_from_the_start_of_each_segment():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 5, (6,), generator=generator)
        numbers = torch.arange(-1, 5).repeat_interleave(lengths)
        expected = [
            0 if n < 0 else (numbers[:t] == n).sum().item() for t, n in enumerate(numbers.tolist())
        ]
        assert segment_positions(numbers.unsqueeze(0))[0].tolist() == expected
        cut = int(torch.randint(1, len(numbers), (), generator=generator))
        rest = segment_positions(
            numbers[cut:].unsqueeze(0),
            numbers[cut - 1 : cut],
            torch.tensor([expected[cut - 1] + 1]),
        )
        assert rest[0].tolist() == expected[cut:]


def test_the_end_of_text_belongs_to_the_document_it_ends():
    tokens = torch.tensor([[5, 9, 6, 9, 9, 7]])
    assert document_segments(tokens, 9).tolist() == [[0, 0, 1, 1, 2, 3]]
    assert document_segments(tokens, 9, torch.tensor([4])).tolist() == [[4, 4, 5, 5, 6, 7]]
    assert document_segments(tokens, 8).tolist() == [[0] * 6]


def test_documents_end_at_a_token_of_the_vocabulary_and_in_a_gpt():
    def messages(**changes) -> str:
        model = ModelConfig(**changes)
        return "\n".join(problem.message for problem in model_problems(model, 1))

    assert not messages(document_end=50256)
    assert "no token of the vocabulary" in messages(document_end=50257)
    assert "no effect with model.kind=deepgpt" in messages(document_end=50256, kind="deepgpt")
