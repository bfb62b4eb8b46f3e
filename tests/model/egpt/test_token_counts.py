"""The mixture with earlier chunks' token counts against its definition, written naively."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.model.build import build_model
from megaegpt.model.egpt.egpt import EGPT, chunk_features
from megaegpt.parallel.grid import ProcessGrid

N, S, C, B, VOCAB = 4, 6, 16, 2, 40
CONFIG = ModelConfig(
    kind="egpt",
    vocab_size=VOCAB,
    hidden_size=C,
    num_layers=1,
    num_heads=2,
    egpt=EGPTConfig(num_chunks=N, chunk_size=S, features_per_chunk=2, token_counts=True),
)


def _model(config: ModelConfig = CONFIG) -> EGPT:
    """Its weights are larger than initial ones: chunks and shares differ from token to token."""
    model = build_model(config, ProcessGrid(), seed=3).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(B, N, S, C, generator=generator, dtype=torch.float64)
    tokens = torch.randint(12, (B, N, S), generator=generator)  # most come again
    targets = torch.randint(12, (B, N, S), generator=generator)
    targets[0, 1, 2] = -100
    return {
        "token_states": states,
        "features": chunk_features(states, CONFIG.egpt)[:, :-1],
        "targets": targets,
        "earlier_tokens": tokens[:, :-1],
    }


def naive_probabilities(
    model: EGPT, batch: dict[str, torch.Tensor], first: list[int]
) -> torch.Tensor:
    """(B, N, S, V), token by token; a chunk of row b sees those from ``first[b]`` on, or of those
    before it.
    """
    hidden = model.hidden_states(batch["token_states"], batch["features"], torch.tensor(first))
    counts = model.counts
    rows = []
    for b in range(B):
        for n in range(N):
            earlier = [c for c in range(n) if (c >= first[b]) == (n >= first[b])]
            for t in range(S):
                h = hidden[b, n, t]
                p = F.softmax(model.head.weight[:VOCAB] @ h, -1)
                if earlier:
                    gate = torch.sigmoid(counts.gate[0] @ h + counts.gate_bias[0])
                    scores = []
                    for c in earlier:
                        feature = batch["features"][b, c].mean(0)
                        key = counts.key @ F.layer_norm(feature, (C,))
                        score = (counts.query @ h) @ key / math.sqrt(len(key))
                        scores.append(score + counts.distance[n - c - 1])
                    weights = F.softmax(torch.stack(scores), -1)
                    cache = torch.zeros(VOCAB, dtype=torch.float64)
                    for weight, c in zip(weights, earlier, strict=True):
                        for token in batch["earlier_tokens"][b, c].tolist():
                            cache = cache + weight * F.one_hot(torch.tensor(token), VOCAB) / S
                    p = (1 - gate) * p + gate * cache
                rows.append(p)
    return torch.stack(rows).view(B, N, S, VOCAB)


@pytest.mark.parametrize("first", [None, [2, 1]])
def test_loss_and_gradients_are_those_of_the_definition(first, monkeypatch):
    random_history = first is not None
    config = replace(CONFIG, egpt=replace(CONFIG.egpt, random_history=random_history))
    model, batch = _model(config), _batch()
    if random_history:
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(first))
    loss = model(**batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    p = naive_probabilities(model, batch, first or [0, 0])
    torch.testing.assert_close(p.sum(-1), torch.ones(B, N, S, dtype=torch.float64))
    real = batch["targets"] >= 0
    nats = -p[real].gather(1, batch["targets"][real].unsqueeze(1)).log()
    expected = torch.autograd.grad(nats.sum(), list(model.parameters()))
    torch.testing.assert_close(loss, nats.sum(), rtol=1e-10, atol=0)
    for (name, _), grad, want in zip(model.named_parameters(), grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-11, msg=name)
        assert name == "chunk_positions.table.weight" or grad.abs().max() > 0, name
    each = model(**batch, reduction="none")
    torch.testing.assert_close(each[real], nats.detach().squeeze(1))


def test_log_probabilities_are_those_of_the_definition():
    model, batch = _model(), _batch()
    hidden = model.hidden_states(batch["token_states"], batch["features"])
    mixture = model.mixture(hidden, batch["features"], batch["earlier_tokens"])
    logits = model.head.full_logits(hidden).flatten(1, 2)
    expected = naive_probabilities(model, batch, [0, 0]).flatten(1, 2)
    for row in range(B):
        found = mixture.log_probabilities(logits[row], row, torch.arange(N * S))
        torch.testing.assert_close(found.exp(), expected[row])
    places = torch.tensor([3, 9, 20])
    some = mixture.log_probabilities(logits[1, places], 1, places)
    torch.testing.assert_close(some.exp(), expected[1, places])


def test_chunks_without_tokens_are_not_seen():
    model, batch = _model(), _batch()
    nothing = torch.full_like(batch["earlier_tokens"], -1)
    with torch.no_grad():
        without = model(**{**batch, "earlier_tokens": nothing}, reduction="none")
        hidden = model.hidden_states(batch["token_states"], batch["features"])
        torch.testing.assert_close(without, model.head.loss(hidden, batch["targets"], "none"))


def test_their_tokens_are_asked_for():
    batch = _batch()
    del batch["earlier_tokens"]
    with pytest.raises(ValueError, match="need the tokens of earlier chunks"):
        _model()(**batch)


def test_bf16_follows_fp64():
    model, batch = _model(), _batch()
    expected = model(**batch)
    expected.backward()
    half = build_model(CONFIG, ProcessGrid())
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    halves = {n: x.bfloat16() if x.is_floating_point() else x for n, x in batch.items()}
    loss = half(**halves)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < 0.01
    for parameter, precise in zip(half.counts.parameters(), model.counts.parameters(), strict=True):
        difference = (parameter.grad.double() - precise.grad).norm()
        assert difference < 0.05 * precise.grad.norm()
