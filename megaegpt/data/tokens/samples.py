"""Training samples as a function of (seed, global sample number), in constant memory.

Shapes: n samples, T tokens predicted in a sample, N chunks in a window.

Sample numbers run on over epochs: number // len(samples) is the epoch. An epoch visits every sample
once, in an order of its own, and starts its first sample at a place of its own (the phase), so
that the cuts between samples move from epoch to epoch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megaegpt.data.tokens.batch import Arrays, shifted
from megaegpt.data.tokens.permutation import EpochOrder
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.data.tokens.windows import tokens_before
from megaegpt.errors import DataError


class Samples(Protocol):
    """Samples by global number, as the loader draws them."""

    def __len__(self) -> int:
        """Samples an epoch."""

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Samples by global number (n,); see :mod:`megaegpt.data.tokens.batch`."""


class StreamSamples(Samples, Protocol):
    """Samples that are rows of a stream."""

    stream: TokenStream
    sample_len: int
    """T, tokens predicted in a sample."""

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First token (n,), in the stream, of samples by global number."""

    def read(self, starts: np.ndarray) -> Arrays:
        """The batch of the samples that begin at these tokens (n,)."""


class EpochLayout:
    """How ``total`` units are cut into samples of ``size`` units: the same number in every epoch.

    All but ``size - 1`` units leave room for the phase, so each unit is visited in most epochs
    and no unit is in two samples of one epoch. Short data has one sample, at a random place.
    """

    def __init__(self, total: int, size: int, seed: int) -> None:
        self.samples = max(1, (total - size + 1) // size)
        self._phases = total - self.samples * size + 1
        self._size = size
        self._seed = seed
        self._order = EpochOrder(self.samples, seed)
        self._phase_of: dict[int, int] = {}

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First unit (n,) of each sample."""
        starts = self._order(numbers) * self._size
        epochs = (numbers // self.samples).tolist()
        return starts + np.array([self.phase(epoch) for epoch in epochs], np.int64)

    def phase(self, epoch: int) -> int:
        """Units before an epoch's first sample."""
        if epoch not in self._phase_of:
            # A key of three words is never one of EpochOrder's, which has two.
            words = np.random.SeedSequence((self._seed, epoch, 1)).generate_state(1, np.uint64)
            while len(self._phase_of) > 1:  # a batch is in one epoch, or at the seam of two
                del self._phase_of[next(iter(self._phase_of))]
            self._phase_of[epoch] = int(words[0]) % self._phases
        return self._phase_of[epoch]


class PretrainingSamples:
    """Rows of ``seq_len`` predicted tokens, anywhere in the stream; documents may end inside.

    Args:
        stream: where the tokens are.
        sample_len: tokens predicted in a row.
        seed: of the order.
        span: first token and end of the part of the stream that is used; None: all of it.
        document_end: token after which nothing is predicted; None: everything is.

    Raises:
        DataError: there are fewer tokens than one sample has.
    """

    def __init__(
        self,
        stream: TokenStream,
        sample_len: int,
        seed: int,
        span: tuple[int, int] | None = None,
        document_end: int | None = None,
    ) -> None:
        self._begin, end = span or (0, len(stream))
        tokens = end - self._begin
        if tokens <= sample_len:
            name = stream.name_at(self._begin)
            raise DataError(f"{name} has {tokens} tokens; one sample needs {sample_len + 1}")
        self.stream = stream
        self.document_end = document_end
        self.sample_len = sample_len
        self._layout = EpochLayout(tokens - 1, sample_len, seed)

    def __len__(self) -> int:
        """Samples an epoch."""
        return self._layout.samples

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Tokens and targets (n, T) of samples by global number."""
        return self.read(self.starts(numbers))

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First token (n,), in the stream, of samples by global number."""
        return self._layout.starts(numbers) + self._begin

    def read(self, starts: np.ndarray) -> Arrays:
        """Tokens and targets (n, T) of samples that begin at ``starts``."""
        rows = _read_rows(self.stream, starts, self.sample_len + 1)
        return shifted(rows, self.document_end)


class ChunkWindows:
    """Windows of ``num_chunks`` consecutive chunks of ``chunk_size`` tokens, for EGPT and DeepGPT.

    Chunk i of a stream is always tokens ``i * chunk_size .. (i + 1) * chunk_size``, so features
    can be stored by chunk number. The phase of an epoch is a number of chunks.

    Args:
        stream: where the tokens are.
        num_chunks: of a window.
        chunk_size: tokens of a chunk.
        seed: of the order.
        span: first token and end of the part of the stream that is used; None: all of it. Chunks
            that begin before it are left out, so that no window reaches over two corpora.
        overlap: tokens before a window that are in its batch too.
        document_end: token after which nothing is predicted; None: everything is.

    Raises:
        DataError: there are fewer tokens than one window has.
    """

    def __init__(
        self,
        stream: TokenStream,
        num_chunks: int,
        chunk_size: int,
        seed: int,
        span: tuple[int, int] | None = None,
        overlap: int = 0,
        document_end: int | None = None,
    ) -> None:
        begin, end = span or (0, len(stream))
        self._first_chunk = -(-begin // chunk_size)
        chunks = (end - 1) // chunk_size - self._first_chunk
        if chunks < num_chunks:
            left_out = min(self._first_chunk * chunk_size, end) - begin
            border = f" behind the {left_out} before its first chunk's border" if left_out else ""
            raise DataError(
                f"{stream.name_at(begin)} has {end - begin} tokens; a window of {num_chunks} "
                f"chunks of {chunk_size} needs {num_chunks * chunk_size + 1}{border}"
            )
        self.stream = stream
        self.document_end = document_end
        self.num_chunks = num_chunks
        self.chunk_size = chunk_size
        self.sample_len = num_chunks * chunk_size
        self.overlap = overlap
        self._layout = EpochLayout(chunks, num_chunks, seed)

    def __len__(self) -> int:
        """Windows an epoch."""
        return self._layout.samples

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Tokens, targets (n, T) and chunk ids (n, N) of windows by global number."""
        return self.read(self.starts(numbers))

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First token (n,), in the stream, of windows by global number."""
        return (self._layout.starts(numbers) + self._first_chunk) * self.chunk_size

    def read(self, starts: np.ndarray) -> Arrays:
        """The batch (see :meth:`batch`) of the windows that begin at ``starts`` (n,)."""
        span = _read_rows(self.stream, starts, self.sample_len + 1)
        batch = shifted(span, self.document_end)
        ids = starts[:, None] // self.chunk_size + np.arange(self.num_chunks)
        batch["chunk_ids"] = ids
        if self.overlap:
            rows = [tokens_before(self.stream, start, self.overlap) for start in starts.tolist()]
            batch["before"] = np.stack(rows)
        return batch


def _read_rows(stream: TokenStream, starts: np.ndarray, length: int) -> np.ndarray:
    rows = np.empty((len(starts), length), stream.dtype)
    stream.read_rows(starts, rows)
    return rows
