"""The mixture with a memory of tokens against its definition, written naively."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.labels import IGNORE
from megaegpt.model.build import build_model
from megaegpt.model.egpt import copy_attention
from megaegpt.model.egpt.egpt import EGPT, chunk_features
from megaegpt.model.egpt.egpt_inputs import following
from megaegpt.parallel.grid import ProcessGrid

N, S, C, B, VOCAB, D, H = 4, 6, 16, 2, 40, 5, 2
RATE = 8  # times the parameters: what scales, distances and sureness are
CONFIG = ModelConfig(
    kind="egpt",
    vocab_size=VOCAB,
    hidden_size=C,
    num_layers=1,
    num_heads=2,
    egpt=EGPTConfig(num_chunks=N, chunk_size=S, token_memory=True, memory_dim=D, memory_pointers=H),
)


def changed(**egpt: object) -> ModelConfig:
    return replace(CONFIG, egpt=replace(CONFIG.egpt, **egpt))  # type: ignore[arg-type]


def _model(config: ModelConfig = CONFIG) -> EGPT:
    """Its weights are larger than initial ones: keys and shares differ from token to token."""
    model = build_model(config, ProcessGrid(), seed=3).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name in ("distance", "by_nearness", "by_peak", "by_agreement"):
            getattr(model.token_memory, name).mul_(1 / RATE)
        model.token_memory.log_scale.fill_(1.5 / RATE)
    return model


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(B, N, S, C, generator=generator, dtype=torch.float64)
    tokens = torch.randint(9, (B, N, S), generator=generator)  # most come again
    targets = torch.randint(9, (B, N, S), generator=generator)
    targets[0, 1, 2] = IGNORE
    earlier = following(tokens)
    earlier[1, 1, 3] = -1
    return {
        "token_states": states,
        "features": chunk_features(states, CONFIG.egpt)[:, :-1],
        "targets": targets,
        "earlier_tokens": earlier,
    }


def naive_probabilities(
    model: EGPT,
    batch: dict[str, torch.Tensor],
    first: list[int] | None = None,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """(B, N, S, V), token by token; a chunk of row b sees those from ``first[b]`` on, or of those
    before it. ``past``: states (B, J, C) and successors (B, J) of whole chunks before the window.
    """
    first = first or [0] * B
    hidden = model.hidden_states(batch["token_states"], batch["features"], torch.tensor(first))
    memory, most = model.token_memory, model.config.egpt.memory_chunks
    states = batch["token_states"].flatten(1, 2)
    successors, before = batch["earlier_tokens"].flatten(1), 0
    key_states = batch.get("earlier_states", batch["token_states"][:, :-1]).flatten(1, 2)
    if past is not None:
        key_states, successors = (
            torch.cat([past[0], key_states], 1),
            torch.cat([past[1], successors], 1),
        )
        before = past[1].shape[1] // S

    def unit(weight, state, h):
        projected = weight.view(H, D, C)[h] @ F.layer_norm(
            state, (C,), memory.norm.weight, memory.norm.bias, model.config.layer_norm_eps
        )
        return projected / projected.norm()

    rows = []
    for b in range(B):
        keys = [[unit(memory.key, state, h) for state in key_states[b]] for h in range(H)]
        for n in range(N):
            for t in range(S):
                h_t = hidden[b, n, t]
                p = F.softmax(model.head.weight[:VOCAB] @ h_t, -1)
                gates, predictions = [torch.zeros((), dtype=torch.float64)], [p]
                for h in range(H):
                    query, scale = (
                        unit(memory.query, states[b, n * S + t], h),
                        (RATE * memory.log_scale[h]).exp(),
                    )
                    chunks = [c for c in range(n) if (c >= first[b]) == (n >= first[b])]
                    chunks = [*range(before), *(before + c for c in chunks)]
                    if most is not None and len(chunks) > most:
                        means = [
                            scale * query @ torch.stack(keys[h][c * S : c * S + S]).mean(0)
                            for c in chunks
                        ]
                        best = torch.stack(means).topk(most).indices.tolist()
                        chunks = [chunks[i] for i in best]
                    seen = [
                        j for c in chunks for j in range(c * S, c * S + S) if successors[b, j] >= 0
                    ]
                    if not seen:
                        continue
                    scores = torch.stack(
                        [
                            scale * query @ keys[h][j]
                            + RATE
                            * memory.distance[
                                h, min(n + before - j // S - 1, memory.distance.shape[1] - 1)
                            ]
                            for j in seen
                        ]
                    )
                    weights = F.softmax(scores, -1)
                    pointed = torch.zeros(VOCAB, dtype=torch.float64)
                    for weight, j in zip(weights, seen, strict=True):
                        pointed = pointed + weight * F.one_hot(successors[b, j], VOCAB)
                    gates.append(
                        memory.gate[h] @ h_t
                        + memory.gate_bias[h]
                        + RATE * memory.by_nearness[h] * 10 * (scores.max() / scale - 0.8).detach()
                        + RATE * memory.by_peak[h] * weights.max().log().detach()
                        + RATE
                        * memory.by_agreement[h]
                        * pointed[successors[b, seen[int(weights.argmax())]]].log().detach()
                    )
                    predictions.append(pointed)
                shares = F.softmax(torch.stack(gates), -1)
                rows.append(sum(s * p for s, p in zip(shares, predictions, strict=True)))
    return torch.stack(rows).view(B, N, S, VOCAB)


def _nats(p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    real = targets >= 0
    return -p[real].gather(1, targets[real].unsqueeze(1)).log().squeeze(1)


@pytest.mark.parametrize("first", [None, [2, 1]])
@pytest.mark.parametrize("rows", [1 << 22, 70])
def test_loss_and_gradients_are_those_of_the_definition(first, rows, monkeypatch):
    monkeypatch.setitem(copy_attention.SCORES_AT_ONCE, "cpu", rows)
    model, batch = _model(changed(random_history=first is not None)), _batch()
    if first is not None:
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(first))
    loss = model(**batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    p = naive_probabilities(model, batch, first)
    torch.testing.assert_close(p.sum(-1), torch.ones(B, N, S, dtype=torch.float64))
    nats = _nats(p, batch["targets"])
    expected = torch.autograd.grad(nats.sum(), list(model.parameters()))
    torch.testing.assert_close(loss, nats.sum(), rtol=1e-10, atol=0)
    for (name, _), grad, want in zip(model.named_parameters(), grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-11, msg=name)
        assert name == "chunk_positions.table.weight" or grad.abs().max() > 0, name
    each = model(**batch, reduction="none")
    torch.testing.assert_close(each[batch["targets"] >= 0], nats.detach())


def test_log_probabilities_are_those_of_the_definition():
    model, batch = _model(), _batch()
    targets = batch.pop("targets")
    with torch.no_grad():
        expected = naive_probabilities(model, batch)
        chosen = torch.rand(targets.shape, generator=torch.Generator().manual_seed(2)) < 0.4
        chosen[:, 0, 0] = True  # sees nothing
        found = torch.cat(list(model.predictions(**batch).logits(chosen)))
    torch.testing.assert_close(found.exp(), expected[chosen])


def test_only_the_chunks_of_the_most_similar_mean_key_are_seen():
    model, batch = _model(changed(memory_chunks=1)), _batch()
    with torch.no_grad():
        nats = model(**batch, reduction="none")
        expected = _nats(naive_probabilities(model, batch), batch["targets"])
        everything = _model()(**batch, reduction="none")
    torch.testing.assert_close(nats[batch["targets"] >= 0], expected)
    assert not torch.allclose(nats[:, 2:], everything[:, 2:])


def test_what_is_held_of_chunks_before_the_window_is_seen():
    model, batch = _model(), _batch()
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(B, 3 * S, C, generator=generator, dtype=torch.float64)
    successors = torch.randint(9, (B, 3 * S), generator=generator)
    with torch.no_grad():
        keys = model.token_memory.keys(states)
        nats = model(**batch, past_keys=keys, past_successors=successors, reduction="none")
        p = naive_probabilities(model, batch, past=(states, successors))
    torch.testing.assert_close(nats[batch["targets"] >= 0], _nats(p, batch["targets"]))


def test_another_texts_states_can_be_the_earlier_chunks():
    model, batch = _model(), _batch()
    batch["earlier_states"] = torch.randn_like(batch["token_states"][:, :-1])
    with torch.no_grad():
        nats = model(**batch, reduction="none")
        expected = _nats(naive_probabilities(model, batch), batch["targets"])
    torch.testing.assert_close(nats[batch["targets"] >= 0], expected)


def test_without_known_successors_the_head_alone_predicts():
    model, batch = _model(), _batch()
    batch["earlier_tokens"] = torch.full_like(batch["earlier_tokens"], -1)
    with torch.no_grad():
        nats = model(**batch, reduction="none")
        hidden = model.hidden_states(batch["token_states"], batch["features"])
        torch.testing.assert_close(nats, model.head.loss(hidden, batch["targets"], "none"))


def test_earlier_tokens_are_needed():
    batch = _batch()
    del batch["earlier_tokens"]
    with pytest.raises(ValueError, match="need the tokens of earlier chunks"):
        _model()(**batch)
