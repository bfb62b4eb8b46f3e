"""EGPT's decoder, DeepGPT and the encoder with every attention kind and every kind of positions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid
from tests.model.naive import naive_egpt_hidden, naive_stack
from tests.tiny.models import ATTENTION, BASE, VARIANTS, build, of_kind, tokens_of, variant

GRID = ProcessGrid()
EXTENDED = {"local_attention": True, "memory_gate": True}


def _states(config: ModelConfig, rows: int) -> Tensor:
    shape = rows, config.egpt.num_chunks, config.egpt.chunk_size, config.hidden_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _opened(config: ModelConfig):
    """A model whose gates, if it has any, are open by different amounts."""
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.copy_(torch.linspace(-0.5, 1.0, len(parameter)))
    return model


def _assert_same_with_gradients(weights: dict[str, Tensor], hidden: Tensor, naive: Tensor) -> None:
    torch.testing.assert_close(hidden, naive, rtol=1e-9, atol=1e-9)
    along = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).double()
    grads, naive_grads = (
        torch.autograd.grad((x * along).sum(), list(weights.values()), allow_unused=True)
        for x in (hidden, naive)
    )
    assert [grad is None for grad in grads] == [name == "head.weight" for name in weights]
    used = [grad for grad in naive_grads if grad is not None]
    largest = max(grad.abs().max() for grad in used)
    for name, grad, naive_grad in zip(weights, grads, naive_grads, strict=True):
        if naive_grad is not None:
            assert ((grad - naive_grad).abs().max() / largest).item() <= 1e-9, name


@pytest.mark.parametrize("extensions", [{}, EXTENDED], ids=["original", "extended"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_egpt_of_any_kind_is_one_sequence_a_token(attention, positions, extensions):
    config = variant(attention, positions)
    if config.window:
        config = replace(config, window=3)
    egpt = EGPTConfig(num_chunks=3, chunk_size=2, **extensions)
    model = _opened(replace(config, kind="egpt", egpt=egpt))
    states = _states(model.config, 1)
    features = states[:, :-1, -1]
    weights = dict(model.named_parameters())
    naive = naive_egpt_hidden(weights, model.config, states[0])
    _assert_same_with_gradients(weights, model.hidden_states(states, features)[0], naive)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_deepgpt_of_any_kind_is_its_blocks_over_a_chunks_states(attention, positions):
    model = build(of_kind(variant(attention, positions), "deepgpt"))
    states = _states(model.config, 1)
    weights = dict(model.named_parameters())
    size = model.config.egpt.chunk_size
    texts = [list(range(t + 1)) for t in range(size)]
    naive = [
        naive_stack(weights, model.config, chunk, list(range(size)), texts) for chunk in states[0]
    ]
    _assert_same_with_gradients(weights, model.hidden_states(states)[0], torch.stack(naive))


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_of_any_kind_equals_the_whole_window(name):
    """In pieces, EGPT from a recorded memory."""
    egpt = _opened(of_kind(VARIANTS[name], "egpt", **EXTENDED))
    deepgpt = build(of_kind(VARIANTS[name], "deepgpt"))
    states = _states(egpt.config, 2)
    features = states[:, :-1, -1]
    whole, of_deepgpt = egpt.hidden_states(states, features), deepgpt.hidden_states(states)
    for chunk in range(egpt.config.egpt.num_chunks):
        memory = egpt.record_memory(features[:, :chunk])
        caches = [KVCache(m.config, GRID, 2, 8, dtype=torch.float64) for m in (egpt, deepgpt)]
        start, parts = 0, []
        for piece in states[:, chunk].split([5, 1, 2], dim=1):
            parts.append(
                torch.cat(
                    [
                        egpt.decode(piece, memory, chunk, start, caches[0]),
                        deepgpt.decode(piece, caches[1]),
                    ],
                    dim=-1,
                )
            )
            start += piece.shape[1]
        expected = torch.cat([whole[:, chunk], of_deepgpt[:, chunk]], dim=-1)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


def _batch(config: ModelConfig, encoder: FrozenEncoder) -> list[Tensor]:
    """What a model of ``config`` is given in training, the targets last."""
    tokens, targets = (tokens_of(BASE, 2, 3 * 8, seed=seed) for seed in (0, 1))
    if config.kind == "gpt":
        return [tokens, targets]
    states, targets = encoder(tokens.view(2, 3, 8)), targets.view(2, 3, 8)
    if config.kind == "deepgpt":
        return [states, targets]
    return [states, states[:, :-1, -1], targets]


@pytest.mark.parametrize("kind", ["egpt", "deepgpt"])
@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_decoders_of_any_kind_learn_over_an_encoder_of_that_kind(attention, positions, kind):
    """A batch by heart: its loss falls at every step, and every weight takes part."""
    config = variant(attention, positions)
    encoder = FrozenEncoder(build_model(config, GRID, seed=1))
    model = build_model(of_kind(config, kind, **(EXTENDED if kind == "egpt" else {})), GRID)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        loss = model(*_batch(model.config, encoder))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(after < before for before, after in pairwise(losses)), losses
    for weight, parameter in model.named_parameters():  # softmax ignores what a key bias adds
        assert weight.endswith("key.bias") or parameter.grad.abs().max() > 0, weight
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["gpt", "egpt", "deepgpt"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_recomputation_changes_no_gradient_with_dropout(attention, kind):
    config = replace(variant(attention, "rotary"), dropout=0.3)
    encoder = FrozenEncoder(build_model(config, GRID, seed=1))
    if kind != "gpt":
        config = of_kind(config, kind, **(EXTENDED if kind == "egpt" else {}))
    batch, gradients = _batch(config, encoder), []
    for recompute in ("none", "selective", "full"):
        model = build_model(config, GRID, activation_checkpointing=recompute)
        torch.manual_seed(0)
        model(*batch).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, selective, full in zip(*gradients, strict=True):
        assert torch.equal(kept, selective)
        assert torch.equal(kept, full)
