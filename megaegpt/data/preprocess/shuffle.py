"""The documents of shards in the order of a seed, in memory that does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megaegpt.bars import progress_bar
from megaegpt.data.tokens.memory_map import ResidentPages
from megaegpt.data.tokens.permutation import Permutation
from megaegpt.data.tokens.shards import Shard, ShardSummary, ShardWriter

DOCUMENTS_AT_ONCE = 1 << 16
"""Documents whose places are computed at once."""
TOKENS_AT_ONCE = 1 << 24
"""Tokens that are in memory at once; a longer document is a piece of its own."""


class ShuffledDocuments:
    """A pseudo-random permutation of all documents of some shards; place p of the new order has
    the document ``permutation[p]`` of the old one.

    The permutation is computed, not stored, and the shards are memory-mapped: memory is that of a
    piece of 2^24 tokens. Documents of a piece are read in the order in which they lie.

    Args:
        prefixes: of the shards, in order; each document has one sequence.
        key: non-negative integers, such as a seed and the number of a split.

    Raises:
        DataError: a shard is missing or damaged.
    """

    def __init__(self, prefixes: Sequence[Path], key: tuple[int, ...]) -> None:
        self._shards = [Shard(prefix) for prefix in prefixes]
        counts = np.array([shard.num_documents for shard in self._shards], np.int64)
        self._firsts = np.cumsum(counts) - counts
        self._permutation = Permutation(max(1, int(counts.sum())), key)
        self._files = [shard.tokens for shard in self._shards]
        self._pages = ResidentPages(sum(file.nbytes for file in self._files))
        self.documents = int(counts.sum())

    def write(
        self,
        first: int,
        last: int,
        prefix: Path,
        show_progress: bool = False,
        before_publishing: Callable[[], None] | None = None,
    ) -> ShardSummary:
        """Make one shard of the places ``first`` to ``last - 1`` of the new order.

        Args:
            before_publishing: see :meth:`ShardWriter.finish`.

        Raises:
            DataError: the disk is full.
        """
        dtype = self._shards[0].dtype
        with (
            ShardWriter(prefix, dtype) as writer,
            progress_bar(total=last - first, title=f"shuffle {prefix.name}", unit="doc",
                 disable=not show_progress) as bar,
        ):  # fmt: skip
            for start in range(first, last, DOCUMENTS_AT_ONCE):
                places = np.arange(start, min(start + DOCUMENTS_AT_ONCE, last))
                numbers = self._permutation(places)
                owners, starts, lengths = self._locate(numbers)
                for piece in _pieces(lengths):
                    tokens = self._read(owners[piece], starts[piece], lengths[piece])
                    writer.add(tokens, lengths[piece])
                bar.update(len(numbers))
            return writer.finish(before_publishing)

    def _locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) shard, first token in it, and number of tokens, of each document (n,)."""
        owners = np.searchsorted(self._firsts, numbers, side="right") - 1
        starts, lengths = np.empty((2, len(numbers)), np.int64)
        for owner in np.unique(owners).tolist():
            mask = owners == owner
            shard, inside = self._shards[owner], numbers[mask] - self._firsts[owner]
            starts[mask] = shard.sequence_pointers[inside] // shard.dtype.itemsize
            lengths[mask] = shard.sequence_lengths[inside]
        return owners, starts, lengths

    def _read(self, owners: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of documents back to back."""
        tokens = np.empty(int(lengths.sum()), self._shards[0].dtype)
        targets = np.cumsum(lengths) - lengths
        order = np.lexsort((starts, owners))
        columns = (column[order].tolist() for column in (owners, starts, lengths, targets))
        for owner, start, length, target in zip(*columns, strict=True):
            tokens[target : target + length] = self._files[owner][start : start + length]
        self._pages.note(len(lengths), tokens.nbytes, self._files)
        return tokens


def _pieces(lengths: np.ndarray) -> Iterator[slice]:
    """Documents one after another, as many at a time as fit a piece, at least one."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = int(ends[first - 1]) if first else 0
        fit = int(np.searchsorted(ends, before + TOKENS_AT_ONCE, side="right"))
        last = max(first + 1, fit)
        yield slice(first, last)
        first = last
