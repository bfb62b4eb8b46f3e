"""Causal attention of the newest T of S tokens: full, in a sliding window, in segments.

A window costs time and memory linear in the length: queries are cut into blocks, and a block reads
its own keys and the few blocks before it, all blocks as one batch under one small mask.

Shapes: B batch, T queries, S keys, H heads, K kv heads, G = H / K, D head dim, n blocks, b tokens a
block, r tokens of the blocks before that a block reads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaegpt.labels import PADDING
from megaegpt.model.segments import same_segment

Made = TypeVar("Made")

_WITHOUT_CUDNN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_SMALLEST_BLOCK = 64  # smaller ones cost more in calls than they save in masked-out products


class Segments(NamedTuple):
    """Segment numbers (see :mod:`megaegpt.model.segments`) of the queries and of the keys."""

    queries: Tensor
    """(B, T)"""
    keys: Tensor
    """(B, S)"""


class OncePerPass:
    """Masks of one forward pass, made by the first layer that asks and kept for the others.

    Layers share what depends on nothing but the tokens' places and the layer's window, which is
    therefore part of each name. In compiled code it is made anew: the compiler makes it part of
    what reads it, and a context that changes between layers would be compiled once for each change.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """Return the result of the first ``make`` for ``name``."""
        if torch.compiler.is_compiling():
            return make()
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def band_mask(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """True where the key at position ``columns`` is visible from ``rows``: the past, in the window.

    (..., T) and (..., S) absolute positions -> (..., T, S)
    """
    distance = rows.unsqueeze(-1) - columns.unsqueeze(-2)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """torch's fused attention, grouped heads without repeated keys: (B, H, T, D), (B, K, S, D)
    twice, mask broadcastable to (B, 1, T, S) -> (B, H, T, D).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and (q.shape[2] == 1 or (mask is not None and q.is_cuda)):
        return _grouped_as_rows(q, k, v, mask, dropout)
    if groups > 1 and q.is_cuda and q.dtype == torch.float32:
        # Of CUDA's kernels only those for half precision know groups. Copies of the keys are small
        # beside the (T, S) weights of all heads, which the unfused products would hold.
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        groups = 1
    return _fused(q, k, v, mask, dropout, is_causal, grouped=groups > 1)


def _grouped_as_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Heads that share keys become rows of one head, which reads the keys once for all of them.

    Decoding is bound by that reading; and CUDA's kernels with masks know no groups.
    """
    heads, length = q.shape[1:3]
    q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, K, G * T, D)
    if mask is not None:
        mask = mask.repeat([1] * (mask.dim() - 2) + [heads // k.shape[1], 1])
    y = _fused(q, k, v, mask, dropout)
    return y.unflatten(2, (-1, length)).flatten(1, 2)  # (B, H, T, D)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool = False,
    grouped: bool = False,
) -> Tensor:
    """torch's attention, with cuDNN's kernel for training without a mask alone.

    cuDNN is the first choice on Hopper and the fastest there. But it builds a plan for each new
    shape, for up to a second, which decoding and evaluation have many of; and with a mask its
    gradients can be NaN where the length is 64 more than a multiple of 128
    (https://github.com/pytorch/pytorch/issues/196678).
    """
    use_any = mask is None and q.shape[2] > 1 and torch.is_grad_enabled()
    with nullcontext() if use_any or not q.is_cuda else sdpa_kernel(_WITHOUT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=grouped)


class _Tokens(NamedTuple):
    """Queries of the last T of the S tokens whose keys and values are beside them."""

    q: Tensor
    """(B, H, T, D)"""
    k: Tensor
    """(B, K, S, D)"""
    v: Tensor
    """(B, K, S, D)"""
    segments: Segments | None

    def cut(self, queries: slice, keys: slice) -> _Tokens:
        """Some of the queries and some of the keys."""
        segments = self.segments
        if segments is not None:
            segments = Segments(segments.queries[:, queries], segments.keys[:, keys])
        return _Tokens(self.q[:, :, queries], self.k[:, :, keys], self.v[:, :, keys], segments)

    def newest(self, count: int) -> _Tokens:
        """With the last ``count`` keys only, if there are more."""
        return self.cut(slice(None), slice(-count, None)) if count < self.k.shape[2] else self


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    masks: OncePerPass | None = None,
) -> Tensor:
    """q (B, H, T, D) of the last T of the S tokens of k and v (B, K, S, D) -> (B, H, T, D).

    Each sees itself and what is before it, in the window and in its segment. The keys of a single
    query may come in any order if all are in its window. Layers that differ in nothing but what
    they compute from the same tokens may share ``masks``.
    """
    length, masks, name = q.shape[2], masks or OncePerPass(), window
    tokens = _Tokens(q, k, v, segments)
    if window is not None:
        tokens = tokens.newest(window + length - 1)
        if tokens.k.shape[2] <= window:
            window = None
    if window is not None and length > (block := max(_SMALLEST_BLOCK, window // 2)):
        return banded_attention(*tokens, window=window, block=block, dropout=dropout, masks=masks)
    if window is None and segments is None and length in (1, k.shape[2]):
        # A compiler's symbolic comparison is no bool for torch's attention: the graph would break.
        causal = True if length > 1 else False  # noqa: SIM210
        return scaled_dot_product(q, tokens.k, tokens.v, is_causal=causal, dropout=dropout)
    mask = masks.get(("all", name), lambda: _mask(tokens, window))
    return scaled_dot_product(q, tokens.k, tokens.v, mask, dropout=dropout)


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None = None,
    *,
    window: int,
    block: int,
    dropout: float = 0.0,
    masks: OncePerPass | None = None,
) -> Tensor:
    """:func:`causal_attention` in a window, by blocks of ``block`` queries."""
    length, masks = q.shape[2], masks or OncePerPass()
    reach = -(-(window - 1) // block) * block
    tokens = _Tokens(q, k, v, segments).newest(reach + length)
    held = tokens.k.shape[2] - length  # keys before the first query
    first = min(reach - held, length)  # queries that lack a full reach of keys before them
    parts = []
    if first:
        begin = tokens.cut(slice(first), slice(held + first))
        mask = masks.get(("begin", window), lambda: _mask(begin, window))
        parts.append(scaled_dot_product(begin.q, begin.k, begin.v, mask, dropout=dropout))
    if first < length:
        rest = tokens.cut(slice(first, None), slice(held + first - reach, None))
        parts.append(_by_blocks(rest, window, block, dropout, masks))
    return torch.cat(parts, dim=2)


def _by_blocks(
    tokens: _Tokens, window: int, block: int, dropout: float, masks: OncePerPass
) -> Tensor:
    """q (B, H, T, D), k and v (B, K, r + T, D) -> (B, H, T, D)"""
    q, k, v, segments = tokens
    batch, _, length, _ = q.shape
    reach, padding = k.shape[2] - length, -length % block
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    queries = q.unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)  # (B * n, H, b, D)
    keys, values = (_spans(x, block, reach) for x in (k, v))

    def mask_of_blocks() -> Tensor:
        of_blocks = None if segments is None else _block_segments(segments, block, reach, padding)
        return _mask(_Tokens(queries, keys, values, of_blocks), window)

    mask = masks.get(("blocks", window), mask_of_blocks)
    y = scaled_dot_product(queries, keys, values, mask, dropout=dropout).unflatten(0, (batch, -1))
    return y.transpose(1, 2).flatten(2, 3)[:, :, :length]  # (B, H, T, D)


def _block_segments(segments: Segments, block: int, reach: int, padding: int) -> Segments:
    """(B, T) and (B, r + T) -> those of the blocks, (B * n, b) and (B * n, r + b)"""
    queries, keys = (F.pad(s, (0, padding), value=PADDING) for s in segments)
    return Segments(queries.reshape(-1, block), _spans(keys.unsqueeze(1), block, reach).squeeze(1))


def _spans(x: Tensor, block: int, reach: int) -> Tensor:
    """Cut the keys or values that each block of queries reads: (B, K, r + n * b, ...) -> (B * n, K,
    r + b, ...)
    """
    blocks = x.unflatten(2, (-1, block)).transpose(1, 2)  # (B, r / b + n, K, b, ...)
    before = reach // block
    count = blocks.shape[1] - before
    return torch.cat([blocks[:, i : i + count] for i in range(before + 1)], dim=3).flatten(0, 1)


def _mask(tokens: _Tokens, window: int | None) -> Tensor:
    """Who sees whom: (T, S), or with segments (B, 1, T, S)."""
    q, k, _, segments = tokens
    columns = torch.arange(k.shape[2], device=q.device)
    rows = columns[-q.shape[2] :]
    mask = band_mask(rows, columns, window)
    if segments is None:
        return mask
    itself = rows.unsqueeze(1) == columns  # (T, S), for padding: no softmax over nothing
    padding = (segments.queries < 0).unsqueeze(2) & itself
    return ((mask & same_segment(*segments)) | padding).unsqueeze(1)
