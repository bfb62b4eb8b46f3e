"""Texts that are written side by side, and join and leave between two tokens.

A text is read first, in pieces, beside those that are running; then it takes a row. A GPT's rows
are one batch: keys and values lie in columns that all rows share, the newest token of each in the
same one, shorter texts padded on the left. Each row sees what it would see alone, and its positions
count from its own first token. An EGPT or a DeepGPT cuts its chunks from the start of a text, which
rows that began at different times do not share: each of its texts has a decoder of its own, and
they take turns.

Shapes: B rows, T new tokens, V vocabulary, K kv heads, S places of a layer's store, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megaegpt.generation.padded import copy_columns, distinct_stores, move_columns
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import Model, new_decoder
from megaegpt.model.decoding import Decoder, new_cache
from megaegpt.model.egpt.held_tokens import MemoryLimits
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT
from megaegpt.model.segments import PADDING

_PIECES = {"cpu": 256, "cuda": 2048}
"""Tokens of about as much work as some steps of the running texts."""


class Reading(Protocol):
    """A prompt that is being read."""

    def advance(self, tokens: Tensor) -> Tensor:
        """The prompt's next ids, (1, T) -> (1, V) logits behind them."""
        ...


class RunningRows(Protocol):
    """The texts that are being written, numbered from 0 on without a gap."""

    most: int
    """Rows that there is room for."""
    piece: int
    """Tokens of a prompt that are read at once, while the running texts wait."""

    @property
    def context(self) -> int | None:
        """Most tokens of a text; None: any number."""
        ...

    def __len__(self) -> int: ...

    def read(self, tokens: int, more: int) -> Reading:
        """Begin to read a prompt of so many tokens, which at most ``more`` follow."""
        ...

    def join(self, reading: Reading) -> None:
        """A prompt that was read whole becomes the last row."""
        ...

    def advance(self, tokens: Sequence[int]) -> Tensor:
        """The next id of each row -> (B, V) logits behind them."""
        ...

    def leave(self, row: int) -> None:
        """Give up a row; the last one takes its number."""
        ...


def new_rows(
    model: Model,
    encoder: FrozenEncoder | None,
    most: int,
    context: int | None,
    limits: MemoryLimits,
) -> RunningRows:
    """Rows of a model in eval mode.

    Args:
        encoder: of an EGPT or DeepGPT.
        most: texts at once.
        context: most tokens of a text of a GPT, its prompt included; None: as many as it sees.
        limits: of an EGPT's token memory.

    Raises:
        ConfigError: a GPT's keys and values of so many texts do not fit into memory.
    """
    if isinstance(model, GPT):
        return BatchedRows(model, most, context or model.config.max_seq_len)
    return SeparateRows(model, encoder, most, limits)


class GPTReading:
    """A prompt with a cache of its own."""

    def __init__(self, model: GPT, tokens: int) -> None:
        self._model = model
        self.cache = new_cache(model, 1, tokens)

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        hidden = self._model.hidden_states(tokens, self.cache)[:, -1]
        return self._model.head.full_logits(hidden)


class BatchedRows:
    """The rows of a GPT, one batch whose size changes from token to token.

    Args:
        model: in eval mode.
        most: rows.
        context: most tokens of a row, at most as many as the model sees.
    """

    def __init__(self, model: GPT, most: int, context: int) -> None:
        self._model, self.most, self.context = model, most, context
        self.piece = _PIECES[model.grid.device.type]
        # The rows together take a column a step. Once the columns are full, those that no row sees
        # any more are given up, which moves the others: not with every token, so there are half a
        # context more of them than a row can see.
        self._cache = new_cache(model, most, context + max(context // 2, 1))
        for store in distinct_stores(self._cache):
            store.zero_()  # what is masked is multiplied by 0, and must be finite
        self._cache.segments = torch.full(
            (most, self._cache.capacity + 1), PADDING, device=model.grid.device
        )
        self._lengths: list[int] = []
        self._views: dict[int, KVCache] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all rows."""
        return self._cache.bytes()

    def read(self, tokens: int, more: int) -> GPTReading:
        if tokens + more > self.context:
            raise ValueError(f"{tokens} and {more} tokens are more than {self.context}")
        return GPTReading(self._model, tokens)

    @torch.inference_mode()
    def join(self, reading: Reading) -> None:
        assert isinstance(reading, GPTReading)
        row, read = len(self._lengths), reading.cache
        if read.length > self._cache.length:
            self._move(self._cache.length - read.length)
        first = self._cache.length - read.length
        for store in distinct_stores(self._cache):
            store[row].zero_()  # a text before it may have left what is not finite
        copy_columns(read, self._cache, [row], first)
        segments = self._segments
        segments[row, :first] = PADDING
        own = 0 if read.segments is None else read.segments[0]
        segments[row, first : self._cache.length + 1] = own
        self._lengths.append(read.length)

    @torch.inference_mode()
    def advance(self, tokens: Sequence[int]) -> Tensor:
        cache, seen = self._cache, max(self._lengths)
        # Columns cost time, too: they are given up as well where a long text has left short ones.
        if cache.length == cache.capacity or cache.length > 2 * seen + seen % 2:
            self._move(cache.length - seen)
        view = self._view(len(self._lengths))
        view.length = cache.length
        ids = torch.tensor(tokens, device=self._model.grid.device).unsqueeze(1)  # (B, 1)
        hidden = self._model.hidden_states(ids, view)[:, -1]
        cache.length = view.length
        self._lengths = [length + 1 for length in self._lengths]
        return self._model.head.full_logits(hidden)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        last = len(self._lengths) - 1
        if row != last:
            for store in (*distinct_stores(self._cache), self._segments):
                store[row] = store[last]
        self._lengths[row] = self._lengths[last]
        self._lengths.pop()
        if not self._lengths:
            self._cache.length = 0

    @property
    def _segments(self) -> Tensor:
        assert self._cache.segments is not None
        return self._cache.segments

    def _view(self, rows: int) -> KVCache:
        """A cache of the first rows, kept: making one costs a slice of each layer."""
        if rows not in self._views:
            self._views[rows] = self._cache.first_rows(rows)
        return self._views[rows]

    def _move(self, shift: int) -> None:
        """Column c becomes column c - ``shift``: keys carry the position of their token in its
        text, which does not change.
        """
        cache, rows = self._cache, len(self._lengths)
        length = cache.length - shift
        if rows:
            move_columns(distinct_stores(self._view(rows)), shift)
            segments = self._segments[:rows]
            moved = torch.full_like(segments[:, : length + 1], PADDING)
            kept = min(length, cache.length) + 1
            moved[:, -kept:] = segments[:, cache.length + 1 - kept : cache.length + 1]
            segments[:, : length + 1] = moved
        cache.length = length


class SeparateRows:
    """A decoder for each text of an EGPT or a DeepGPT: texts of any length, one after the other."""

    context: int | None = None
    piece = sys.maxsize  # given at once, chunks of a prompt that its end does not see are left out

    def __init__(
        self, model: Model, encoder: FrozenEncoder | None, most: int, limits: MemoryLimits
    ) -> None:
        self._model, self._encoder, self.most, self._limits = model, encoder, most, limits
        self._decoders: list[Decoder] = []

    def __len__(self) -> int:
        return len(self._decoders)

    def read(self, tokens: int, more: int) -> Decoder:
        length = tokens + more
        return new_decoder(self._model, self._encoder, 1, length, limits=self._limits)

    def join(self, reading: Reading) -> None:
        self._decoders.append(reading)

    def advance(self, tokens: Sequence[int]) -> Tensor:
        device = self._model.grid.device
        rows = zip(self._decoders, tokens, strict=True)
        return torch.cat([row.advance(torch.tensor([[t]], device=device)) for row, t in rows])

    def leave(self, row: int) -> None:
        self._decoders[row] = self._decoders[-1]
        self._decoders.pop()
