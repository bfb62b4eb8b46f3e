"""Training samples as a function of (seed, global sample number), in constant memory.

Shapes: n samples, S tokens predicted in a sample, N chunks in a window.

Sample numbers run on over epochs: number // len(samples) is the epoch. An epoch visits every sample
once, in an order of its own, and starts its first sample at a place of its own (the phase), so
that the cuts between samples move from epoch to epoch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megaegpt.data.tokens.permutation import EpochOrder
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import DataError


class Samples(Protocol):
    """What a loader needs to know of its data."""

    def __len__(self) -> int:
        """Samples an epoch."""

    def batch(
        self, numbers: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray | tuple[np.ndarray, ...]:
        """Samples by global number; tokens, (n, row_len) int64, come first and fill ``out``."""

    @property
    def row_len(self) -> int:
        """Length of a row of tokens."""


class StreamSamples(Samples, Protocol):
    """Samples that are rows of a stream."""

    stream: TokenStream

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First token (n,), in the stream, of samples by global number."""

    def read(
        self, starts: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray | tuple[np.ndarray, ...]:
        """What ``batch`` gives, of rows that begin at these tokens."""


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
        seq_len: tokens predicted in a row.
        seed: of the order.
        span: first token and end of the part of the stream that is used; None: all of it.

    Raises:
        DataError: there are fewer tokens than one sample has.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        seed: int,
        span: tuple[int, int] | None = None,
    ) -> None:
        self._begin, end = span or (0, len(stream))
        tokens = end - self._begin
        if tokens <= seq_len:
            raise DataError(
                f"{stream.name_at(self._begin)} has {tokens} tokens; one sample needs {seq_len + 1}"
            )
        self.stream = stream
        self.seq_len = seq_len
        self._layout = EpochLayout(tokens - 1, seq_len, seed)

    def __len__(self) -> int:
        """Samples an epoch."""
        return self._layout.samples

    @property
    def row_len(self) -> int:
        """Length of a row of tokens: inputs and targets overlap in all but one."""
        return self.seq_len + 1

    def batch(self, numbers: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens (n, seq_len + 1) int64 of samples by global number, in ``out`` if given."""
        return self.read(self.starts(numbers), out)

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First token (n,), in the stream, of samples by global number."""
        return self._layout.starts(numbers) + self._begin

    def read(self, starts: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens (n, seq_len + 1) of rows that begin at ``starts``."""
        out = np.empty((len(starts), self.row_len), np.int64) if out is None else out
        self.stream.read_rows(starts, out)
        return out


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
    ) -> None:
        begin, end = span or (0, len(stream))
        self._first_chunk = -(-begin // chunk_size)
        chunks = (end - 1) // chunk_size - self._first_chunk
        if chunks < num_chunks:
            raise DataError(
                f"{stream.name_at(begin)} has {end - begin} tokens; a window of {num_chunks} "
                f"chunks of {chunk_size} needs {num_chunks * chunk_size + 1}"
            )
        self.stream = stream
        self.num_chunks = num_chunks
        self.chunk_size = chunk_size
        self._layout = EpochLayout(chunks, num_chunks, seed)

    def __len__(self) -> int:
        """Windows an epoch."""
        return self._layout.samples

    @property
    def row_len(self) -> int:
        """Length of a row of tokens: all chunks, and the target of the last token."""
        return self.num_chunks * self.chunk_size + 1

    def batch(
        self, numbers: np.ndarray, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n, num_chunks * chunk_size + 1) and chunk numbers (n, num_chunks), both int64."""
        return self.read(self.starts(numbers), out)

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """First token (n,), in the stream, of windows by global number."""
        return (self._layout.starts(numbers) + self._first_chunk) * self.chunk_size

    def read(
        self, starts: np.ndarray, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and chunk numbers of windows that begin at ``starts``."""
        out = np.empty((len(starts), self.row_len), np.int64) if out is None else out
        self.stream.read_rows(starts, out)
        return out, starts[:, None] // self.chunk_size + np.arange(self.num_chunks)
