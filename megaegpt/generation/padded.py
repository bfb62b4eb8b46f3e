"""Texts of different lengths in one batch of a GPT: shorter ones are padded on the left.

Every row sees what it would see alone, and its positions count from its own first token. When the
context of a row is full, that row alone is read again from the tokens that it keeps; the others go
on beside it.

Shapes: B rows, T new tokens, V vocabulary, k rows that are read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megaegpt.model.attention.cache import KVCache
from megaegpt.model.decoding import context_start, new_cache
from megaegpt.model.gpt import GPT
from megaegpt.model.segments import PADDING, document_segments


class PaddedGPTDecoder:
    """Keys and values of the tokens that each row sees, in columns that all rows share.

    Args:
        model: in eval mode.
        lengths: tokens of each prompt.
        max_new_tokens: most that follow a prompt.
    """

    def __init__(self, model: GPT, lengths: Sequence[int], max_new_tokens: int) -> None:
        self._model = model
        self._lengths = list(lengths)
        self._max_seq_len = longest = model.config.max_seq_len
        self._starts = [context_start(length, longest) for length in lengths]
        seen = max(length - start for length, start in zip(lengths, self._starts, strict=True))
        # The rows together take a column a step. Once the columns are full, those that no row
        # sees any more are given up, which moves the others: not with every token, so there are
        # half a context more of them than a row can see.
        capacity = min(seen + max_new_tokens, longest + max(longest // 2, 1))
        self._cache = new_cache(model, len(lengths), capacity)
        self._tokens = torch.zeros(  # the ids in the columns of the cache
            len(lengths), capacity, dtype=torch.long, device=model.grid.device
        )

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """(B, V) logits of the next tokens.

        Args:
            tokens: first the prompts, (B, T), padded on the left to the longest; then (B, 1).
        """
        if self._cache.length == 0:
            return self._read_prompts(tokens)
        self._read_again_where_full()
        if self._cache.length == self._cache.capacity:
            self._give_up_unseen_columns()
        self._tokens[:, self._cache.length] = tokens[:, 0]
        self._lengths = [length + 1 for length in self._lengths]
        hidden = self._model.hidden_states(tokens, self._cache)[:, -1]
        return self._model.head.full_logits(hidden)

    def _read_prompts(self, tokens: Tensor) -> Tensor:
        seen = [length - start for length, start in zip(self._lengths, self._starts, strict=True)]
        width = max(seen)
        tokens = tokens[:, -width:]
        columns = torch.arange(width, device=tokens.device)
        real = columns >= width - torch.tensor(seen, device=tokens.device).unsqueeze(1)
        document_end = self._model.config.document_end
        segments = (
            torch.zeros_like(tokens)
            if document_end is None
            else document_segments(tokens, document_end)
        ).where(real, PADDING)
        self._tokens[:, :width] = tokens
        hidden = self._model.hidden_states(tokens, self._cache, segments)[:, -1]
        return self._model.head.full_logits(hidden)

    def _read_again_where_full(self) -> None:
        """Rows whose next token does not fit into the context forget the older half of it."""
        starts = [context_start(length + 1, self._max_seq_len) for length in self._lengths]
        rows = [row for row, old in enumerate(self._starts) if starts[row] != old]
        self._starts = starts
        if not rows:
            return
        # They are all equally full, so that they keep equally many tokens.
        kept = self._lengths[rows[0]] - starts[rows[0]]
        cache, first = self._cache, self._cache.length - kept
        segments = cache.segments
        assert segments is not None  # the prompts were padded
        segments[rows, : cache.length] = PADDING
        segments[rows, cache.length] = 0
        if kept == 0:
            return
        again = new_cache(self._model, len(rows), kept)
        self._model.hidden_states(self._tokens[rows, first : cache.length], again)
        segments[rows, first : cache.length + 1] = 0 if again.segments is None else again.segments
        copy_columns(again, cache, rows, first)

    def _give_up_unseen_columns(self) -> None:
        """Move the columns that some row sees to the front: keys carry the position of their token
        in its text, which does not change.
        """
        cache = self._cache
        seen = max(length - s for length, s in zip(self._lengths, self._starts, strict=True))
        shift = cache.length - seen
        assert cache.segments is not None
        move_columns((self._tokens.unsqueeze(1), *distinct_stores(cache)), shift)
        cache.segments[:, : seen + 1] = cache.segments[:, shift : cache.length + 1].clone()
        cache.length = seen


def distinct_stores(cache: KVCache) -> list[Tensor]:
    """The tensors of a cache, each once: (B, K, S, D)."""
    pairs = cache.stores()
    return [x for keys, values in pairs for x in ((keys,) if keys is values else (keys, values))]


def move_columns(stores: Iterable[Tensor], shift: int) -> None:
    """Column c becomes column c - ``shift`` in stores of (B, K, S, D); what leaves at one end comes
    back at the other, without a meaning.
    """
    for store in stores:
        # A column c is at place c mod S of a store with S places, before and after.
        places = store.shape[2]
        order = (torch.arange(places, device=store.device) + shift) % places
        store.copy_(store.index_select(2, order))


def copy_columns(source: KVCache, target: KVCache, rows: list[int], first: int) -> None:
    """The k rows of ``source``, full, into ``rows`` of ``target`` from column ``first`` on."""
    for new, old in zip(distinct_stores(source), distinct_stores(target), strict=True):
        held = torch.arange(source.length - new.shape[2], source.length, device=old.device)
        places = (first + held) % old.shape[2]
        k = torch.tensor(rows, device=old.device).unsqueeze(1)
        # Advanced indices around a slice come first: (k, places, K, D).
        old[k, :, places] = new[:, :, held % new.shape[2]].permute(0, 2, 1, 3)
