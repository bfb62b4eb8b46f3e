"""A whole split in non-overlapping windows: every target exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megaegpt.data.stream import TokenStream

IGNORED = -100


@dataclass(frozen=True)
class EvaluationBatch:
    """Windows side by side.

    Attributes:
        tokens: (n, S) int64 inputs, 0 after the stream's end.
        targets: (n, S) int64, the token after each input; -100 after the stream's end.
        chunk_ids: (n, N) int64 numbers of the window's chunks, for windows of chunks. A chunk
            that is not whole has no stored features: it gets the number of the last whole one,
            which is read for chunks after it only, and those are padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    chunk_ids: np.ndarray | None = None


class EvaluationWindows:
    """The windows of a stream: window w predicts tokens ``w * S + 1 .. (w + 1) * S``.

    Only token 0 of the stream is never predicted. The last window is padded.

    Args:
        stream: the split.
        sample_len: S, tokens predicted in a window.
        chunk_size: for windows of chunks; divides ``sample_len``.
    """

    def __init__(self, stream: TokenStream, sample_len: int, chunk_size: int | None = None) -> None:
        if chunk_size is not None and sample_len % chunk_size:
            raise ValueError(f"windows of {sample_len} tokens are not whole chunks of {chunk_size}")
        self.stream = stream
        self.sample_len = sample_len
        self.chunk_size = chunk_size

    def __len__(self) -> int:
        """Windows."""
        return -(-(len(self.stream) - 1) // self.sample_len)

    def batch(self, numbers: np.ndarray) -> EvaluationBatch:
        """Windows by number (n,); a number of ``len(self)`` or more gives a window of padding."""
        size = self.sample_len
        tokens = np.zeros((len(numbers), size), np.int64)
        targets = np.full((len(numbers), size), IGNORED, np.int64)
        for row, start in enumerate((numbers * size).tolist()):
            length = min(size, len(self.stream) - 1 - start)
            if length > 0:
                span = self.stream.read(start, length + 1)
                tokens[row, :length] = span[:-1]
                targets[row, :length] = span[1:]
        return EvaluationBatch(tokens, targets, self._chunk_ids(numbers))

    def _chunk_ids(self, numbers: np.ndarray) -> np.ndarray | None:
        if self.chunk_size is None:
            return None
        per_window = self.sample_len // self.chunk_size
        ids = numbers[:, None] * per_window + np.arange(per_window)
        return np.minimum(ids, max(0, len(self.stream) // self.chunk_size - 1))

    def batches(
        self, batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> Iterator[EvaluationBatch]:
        """This data-parallel rank's share; every rank gets the same number of equally large
        batches.

        Rank r has windows r, r + dp_size, ...; ranks that run out get padding, so that collective
        operations stay in step.
        """
        share = -(-len(self) // dp_size)
        for first in range(0, share, batch_size):
            rows = np.arange(first, first + batch_size)
            numbers = np.where(rows < share, rows * dp_size + dp_rank, len(self))
            yield self.batch(numbers)


def evaluation_windows(
    stream: TokenStream,
    sample_len: int,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    chunk_size: int | None = None,
) -> Iterator[EvaluationBatch]:
    """Batches of one data-parallel rank; see :class:`EvaluationWindows`."""
    return EvaluationWindows(stream, sample_len, chunk_size).batches(batch_size, dp_rank, dp_size)
