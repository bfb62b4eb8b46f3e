"""Cached decoding equals computing everything at once, in the memory that its formula says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megaegpt.config import ModelConfig
from megaegpt.config.presets import create_model_config
from megaegpt.errors import ConfigError
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.gpt import GPT
from megaegpt.model.segments import padding_segments
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.models import ATTENTION, POSITIONS, WINDOW, build, tokens_of, variant

PROMPT = 3 * WINDOW + 2
ODD_PIECES = (1, 7, 2, WINDOW + 3, 1)  # together PROMPT + 2


def _cache(config: ModelConfig, rows: int, capacity: int) -> KVCache:
    return KVCache(config, ProcessGrid(), rows, capacity, dtype=torch.float64)


def _in_pieces(model: GPT, tokens: torch.Tensor, cache: KVCache, pieces) -> torch.Tensor:
    parts = [model.hidden_states(piece, cache) for piece in tokens.split(list(pieces), dim=1)]
    return torch.cat(parts, dim=1)


def _equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_equals_uncached(attention, positions):
    """A prompt longer than the window at once and in odd pieces, single tokens, and a second prompt
    after a reset.
    """
    config = variant(attention, positions)
    model = build(config)
    tokens = tokens_of(config, 2, PROMPT + 2)
    whole = model.hidden_states(tokens)
    cache = _cache(config, 2, PROMPT + 2)
    _equal(_in_pieces(model, tokens, cache, (PROMPT, 1, 1)), whole)
    assert cache.length == PROMPT + 2
    cache.reset()
    second = tokens_of(config, 2, PROMPT + 2, seed=1)
    _equal(_in_pieces(model, second, cache, ODD_PIECES), model.hidden_states(second))
    cache.reset()
    _equal(_in_pieces(model, tokens, cache, (1,) * (PROMPT + 2)), whole)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_prompts_of_different_lengths_padded_on_the_left(attention, positions):
    """Prefill in two pieces, the first of them padding only for one row, then token by token."""
    config = variant(attention, positions)
    model = build(config)
    lengths, new = (PROMPT, 3, WINDOW), 7
    texts = [tokens_of(config, 1, n + new, seed=n) for n in lengths]
    padded = torch.zeros(3, PROMPT + new, dtype=torch.int64)
    real = torch.zeros(3, PROMPT, dtype=torch.bool)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        padded[row, PROMPT - length :] = text[0]
        real[row, PROMPT - length :] = True
    cache, segments = _cache(config, 3, PROMPT + new), padding_segments(real)
    cut = PROMPT - 4
    parts = [
        model.hidden_states(padded[:, :cut], cache, segments[:, :cut]),
        model.hidden_states(padded[:, cut:PROMPT], cache, segments[:, cut:]),
    ]
    parts += [model.hidden_states(padded[:, t : t + 1], cache) for t in range(PROMPT, PROMPT + new)]
    hidden = torch.cat(parts, dim=1)
    assert hidden.isfinite().all()
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        _equal(hidden[row, PROMPT - length :], model.hidden_states(text)[0])
    cache.reset()  # and the padding is forgotten
    _equal(model.hidden_states(padded, cache), model.hidden_states(padded))


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_300_tokens_past_the_window(attention):
    config = replace(variant(attention, "rotary"), num_layers=2, hidden_size=16)
    model = build(config)
    length = WINDOW + 300
    tokens = tokens_of(config, 2, length)
    cache = _cache(config, 2, length)
    hidden = _in_pieces(model, tokens, cache, (WINDOW,) + (1,) * 300)
    _equal(hidden, model.hidden_states(tokens))


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_documents_end_in_the_cache_where_they_end_outside_it(attention):
    config = replace(variant(attention, "learned"), document_end=60)
    model = build(config)
    tokens = tokens_of(config, 2, PROMPT + 2)
    tokens[0, 0] = tokens[0, 7] = tokens[1, 9] = tokens[1, 10] = 60  # ends of pieces among them
    whole = model.hidden_states(tokens)
    for pieces in ((PROMPT + 2,), ODD_PIECES, (1,) * (PROMPT + 2)):
        _equal(_in_pieces(model, tokens, _cache(config, 2, PROMPT + 2), pieces), whole)


@torch.no_grad()
def test_going_back_in_a_full_cache_writes_over_what_came_after():
    config = variant("grouped", "rotary")
    model = build(config)
    first, second = (tokens_of(config, 1, 9, seed=seed) for seed in (0, 1))
    second[:, :4] = first[:, :4]
    cache = _cache(config, 1, 9)
    model.hidden_states(first, cache)
    cache.length = 4
    _equal(model.hidden_states(second[:, 4:], cache), model.hidden_states(second)[:, 4:])


def test_a_cache_takes_no_gradient_and_keeps_no_graph():
    config = variant("grouped_window_every_2", "rotary")
    model, cache = build(config), _cache(config, 1, 20)
    model.hidden_states(tokens_of(config, 1, 9), cache)
    k, v = torch.randn(2, 1, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    for layer in range(2):
        assert not any(kept.requires_grad for kept in cache.update(layer, k, v))


# Limits


def test_more_tokens_than_the_cache_holds_are_refused():
    config = variant("window", "rotary")
    model, cache = build(config), _cache(config, 1, 10)
    model.hidden_states(tokens_of(config, 1, 8), cache)
    with pytest.raises(ConfigError, match="holds 10 tokens: 8 are in it and 3 more do not fit"):
        model.hidden_states(tokens_of(config, 1, 3), cache)
    padded = padding_segments(torch.tensor([[False, True, True]]))
    cache.reset()
    model.hidden_states(tokens_of(config, 1, 3), cache, padded)
    model.hidden_states(tokens_of(config, 1, 6), cache)
    with pytest.raises(ConfigError, match="holds 10 tokens: 9 are in it"):
        model.hidden_states(tokens_of(config, 1, 2), cache)


def test_rows_that_do_not_fit_and_padding_behind_a_text_are_refused():
    config = variant("multi_head", "learned")
    model = build(config)
    with pytest.raises(ValueError, match="1 rows for a cache of 2"):
        model.hidden_states(tokens_of(config, 1, 3), _cache(config, 2, 10))
    cache, tokens = _cache(config, 1, 10), tokens_of(config, 1, 3)
    behind = padding_segments(torch.tensor([[True, True, False]]))
    with pytest.raises(ValueError, match=r"padding .* must come before"):
        model.hidden_states(tokens, cache, behind)
    model.hidden_states(tokens, cache)
    with pytest.raises(ValueError, match=r"padding .* must come before"):
        model.hidden_states(tokens, cache, padding_segments(torch.tensor([[False, True, True]])))


# Memory

GPT2 = create_model_config("gpt2-small (124M)", num_layers=2)
ROWS, CAPACITY = 3, 40


def _bytes(config: ModelConfig, grid: ProcessGrid | None = None, dtype=torch.bfloat16) -> int:
    return KVCache(config, grid or ProcessGrid(), ROWS, CAPACITY, dtype=dtype).bytes()


@pytest.mark.parametrize(
    ("changes", "numbers_a_token_and_layer"),
    [
        ({}, 2 * 12 * 64),
        ({"num_kv_heads": 4}, 2 * 4 * 64),
        ({"num_kv_heads": 1, "head_dim": 32}, 2 * 1 * 32),
        ({"attention": "latent"}, 768 // 8),
        (
            {
                "attention": "latent",
                "latent_dim": 100,
                "positions": "rotary",
                "rope_head_dim": 32,
            },
            100 + 32,
        ),
    ],
)
def test_bytes_are_those_of_the_formula(changes, numbers_a_token_and_layer):
    config = replace(GPT2, **changes)
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        expected = 2 * ROWS * CAPACITY * numbers_a_token_and_layer * size
        assert _bytes(config, dtype=dtype) == expected


def test_bytes_on_a_tensor_parallel_rank():
    """Heads are shared out, down to one a rank; latents are on all ranks."""
    of_4 = ProcessGrid(tp_rank=1, tp_size=4)
    assert _bytes(GPT2, of_4) * 4 == _bytes(GPT2)
    two_heads = replace(GPT2, num_kv_heads=2)
    assert _bytes(two_heads, of_4) * 2 == _bytes(two_heads)
    latent = replace(GPT2, attention="latent")
    assert _bytes(latent, of_4) == _bytes(latent)


def test_grouped_and_latent_caches_are_a_third_and_a_sixteenth_of_multi_heads():
    assert _bytes(replace(GPT2, num_kv_heads=4)) * 3 == _bytes(GPT2)
    assert _bytes(replace(GPT2, attention="latent", latent_dim=768 // 8)) * 16 == _bytes(GPT2)


def test_a_windows_cache_is_constant_past_the_window():
    """2 * B * K * min(window, capacity) * D a layer; a global layer in between stays full."""
    numbers = 2 * ROWS * 12 * 64 * 2
    for window, held in ((8, 8), (CAPACITY, CAPACITY), (1000, CAPACITY)):
        assert _bytes(replace(GPT2, window=window)) == 2 * held * numbers
    mixed = replace(GPT2, window=8, window_every=2)
    assert _bytes(mixed) == (8 + CAPACITY) * numbers
    config = variant("window", "rotary")
    caches = [_cache(config, 1, capacity) for capacity in (WINDOW, 10 * WINDOW, 1000 * WINDOW)]
    assert len({cache.bytes() for cache in caches}) == 1


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors that an object holds, at any depth."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _tensors_in(item)


@torch.no_grad()
def test_bytes_count_everything_that_is_kept():
    """What decoding leaves allocated is what bytes() says."""
    for attention in ATTENTION:
        config = variant(attention, "none")
        model, cache = build(config), _cache(config, 2, 30)
        for length in (20, 1, 1):
            model.hidden_states(tokens_of(config, 2, length), cache)
        kept = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors_in(cache)
        }
        assert sum(kept.values()) == cache.bytes(), attention
