"""A whole text in windows: every target exactly once.

Shapes: n windows, S tokens of a window, N chunks of a window.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megaegpt.data.tokens.batch import Arrays, mask_after
from megaegpt.labels import IGNORE, NOTHING_BEFORE


class TokenSource(Protocol):
    """A row of tokens: a :class:`~megaegpt.data.tokens.stream.TokenStream`, or a tokenized text."""

    def __len__(self) -> int:
        """Tokens."""

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens from ``start`` on."""


class Windows(Protocol):
    """The windows that an evaluation goes through."""

    def __len__(self) -> int:
        """Windows."""

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Windows by number (n,), padded by token 0 and target -100."""


def tokens_before(source: TokenSource, start: int, length: int) -> np.ndarray:
    """The ``length`` tokens before ``start``; without so many, -1 in the place of each."""
    if start < length:
        return np.full(length, NOTHING_BEFORE, np.int64)
    return source.read(start - length, length).astype(np.int64)


class EvaluationWindows:
    """The windows of a text, each ``stride`` tokens after the one before.

    With a stride of S, the default, they do not overlap: window w predicts tokens ``w * S + 1 ..
    (w + 1) * S``. A smaller stride gives every token (but those of the first window) at least ``S -
    stride`` tokens of context: a window counts its last ``stride`` targets only. Token 0 is never
    predicted. The last window is padded.

    Args:
        source: the text.
        sample_len: S, tokens of a window.
        num_chunks: for windows of chunks; divides ``sample_len``.
        stride: 1 to S; a whole number of chunks.
        overlap: tokens before a window that are in its batch too.
        document_end: token after which nothing is predicted; None: everything is.
    """

    def __init__(
        self,
        source: TokenSource,
        sample_len: int,
        num_chunks: int = 1,
        stride: int | None = None,
        overlap: int = 0,
        document_end: int | None = None,
    ) -> None:
        self.source = source
        self.overlap = overlap
        self.sample_len = sample_len
        self.num_chunks = num_chunks
        self.stride = sample_len if stride is None else stride
        self.document_end = document_end
        chunk_size, rest = divmod(sample_len, num_chunks)
        if rest:
            raise ValueError(f"windows of {sample_len} tokens are not {num_chunks} whole chunks")
        if not 1 <= self.stride <= sample_len:
            raise ValueError(f"a stride of {stride} tokens over windows of {sample_len}")
        if num_chunks > 1 and self.stride % chunk_size:
            raise ValueError(f"a stride of {stride} tokens is not whole chunks of {chunk_size}")

    def __len__(self) -> int:
        """Windows."""
        targets = max(len(self.source) - 1, 0)
        first = min(targets, self.sample_len)
        return (first > 0) + -(-(targets - first) // self.stride)

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Windows by number (n,); a number of ``len(self)`` or more gives a window of padding."""
        size = self.sample_len
        tokens = np.zeros((len(numbers), size), np.int64)
        targets = np.full((len(numbers), size), IGNORE, np.int64)
        before = np.full((len(numbers), self.overlap), NOTHING_BEFORE, np.int64)
        for row, number in enumerate(numbers.tolist()):
            start = number * self.stride
            length = min(size, len(self.source) - 1 - start)
            if number >= len(self) or length <= 0:
                continue
            span = self.source.read(start, length + 1)
            counted = 0 if number == 0 else size - self.stride
            tokens[row, :length] = span[:-1]
            targets[row, counted:length] = span[1 + counted :]
            before[row] = tokens_before(self.source, start, self.overlap)
        mask_after(self.document_end, tokens, targets)
        batch = {"tokens": tokens, "targets": targets}
        if self.stride % (self.sample_len // self.num_chunks) == 0:
            per_stride = self.stride * self.num_chunks // self.sample_len
            batch["chunk_ids"] = numbers[:, None] * per_stride + np.arange(self.num_chunks)
        return batch | {"before": before} if self.overlap else batch
