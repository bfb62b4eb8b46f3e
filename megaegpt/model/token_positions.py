"""Where a GPT's tokens stand: their positions and segments, with or without a cache before them.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaegpt.labels import PADDING
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.segments import document_segments, segment_positions


def place_tokens(
    tokens: Tensor, cache: KVCache | None, segments: Tensor | None, document_end: int | None
) -> tuple[Tensor, Tensor | None]:
    """Positions, (T,) or (B, T), and segments, (B, T) or None where every row is one text, of the
    tokens (B, T). A cache notes the segments; its length is not changed.
    """
    start = 0 if cache is None else cache.length
    started = cache is not None and cache.segments is not None
    if segments is None and document_end is None and not started:
        return torch.arange(start, start + tokens.shape[1], device=tokens.device), None
    if cache is None:
        segments = _segments(tokens, segments, document_end, None)
        return segment_positions(segments), segments
    open_before, count = cache.next_segment()
    if segments is not None:
        _check_left_padding(segments, cache)
    segments = _segments(tokens, segments, document_end, open_before)
    cache.keep_segments(segments, _following(tokens, segments, document_end))
    return segment_positions(segments, open_before, count), segments


def _segments(
    tokens: Tensor, given: Tensor | None, document_end: int | None, first: Tensor | None
) -> Tensor:
    if given is not None:
        return given
    if document_end is not None:
        return document_segments(tokens, document_end, first)
    assert first is not None  # one of the three says what the segments are
    return first.unsqueeze(1).expand(tokens.shape)


def _following(tokens: Tensor, segments: Tensor, document_end: int | None) -> Tensor:
    """The segment (B,) of a token that would come next; after padding, a first one."""
    last = segments[:, -1].clamp(min=0)
    if document_end is None:
        return last
    return last + (tokens[:, -1] == document_end)


def _check_left_padding(segments: Tensor, cache: KVCache) -> None:
    """A padded column behind a text would take a place in the window of those after it."""
    before = segments[:, :1]
    if cache.length:
        known = cache.segments
        last = slice(cache.length - 1, cache.length)
        before = torch.zeros_like(before) if known is None else known[:, last]
    previous = torch.cat([before, segments[:, :-1]], dim=1)
    if bool(((segments < 0) & (previous >= 0)).any()):
        raise ValueError(f"with a cache, padding ({PADDING}) must come before a row's tokens")
