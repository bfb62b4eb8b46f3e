"""The contents of a shard set: lengths of documents, samples of text, differences of two sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from megaegpt.data.tokens.shards import BLOCK, Shard
from megaegpt.errors import DataError
from megaegpt.files import is_special, naming_failures, whole_file

_BAR = 40


class LengthHistogram:
    """Documents by length, in powers of two: bin b has lengths of 2^(b-1) to 2^b - 1, bin 0 the
    empty.

    Attributes:
        counts: (33,) int64 documents of each bin.
        documents: all of them.
        tokens: of all documents.
        longest: tokens of the longest document.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.counts = np.zeros(33, np.int64)
        self.documents = self.tokens = self.longest = 0
        for lengths in (block for shard in shards for block in _document_lengths(shard)):
            bins = np.ceil(np.log2(lengths + 1.0)).astype(np.int64)
            self.counts += np.bincount(bins, minlength=33)
            self.documents += len(lengths)
            self.tokens += int(lengths.sum())
            self.longest = max(self.longest, int(lengths.max(initial=0)))

    def rows(self) -> list[tuple[int, int, int]]:
        """Least and most tokens, and documents, of each bin from the first to the last in use."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return []
        return [
            (2 ** (b - 1) if b else 0, 2**b - 1, int(self.counts[b]))
            for b in range(int(used[0]), int(used[-1]) + 1)
        ]

    def text(self) -> str:
        """A line and a bar for each bin."""
        most = max(int(self.counts.max()), 1)
        return "\n".join(
            f"{low:>12,} to {high:<12,} {count:>12,} {'#' * -(-_BAR * count // most)}"
            for low, high, count in self.rows()
        )

    def draw(self, path: Path) -> None:
        """A picture of it.

        Raises:
            DataError: matplotlib is not installed, does not know the kind of picture, or the file
                cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise DataError("--png needs matplotlib: pip install matplotlib") from None
        rows = self.rows()
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.bar([f"{low:,}\u2013{high:,}" for low, high, _ in rows], [row[2] for row in rows])
        axes.set(xlabel="tokens", ylabel="documents")
        axes.set_title(f"{self.documents:,} documents, {self.tokens:,} tokens")
        axes.tick_params(axis="x", rotation=60)
        kind = path.suffix.removeprefix(".").lower()
        kinds = figure.canvas.get_supported_filetypes()
        if not is_special(path) and kind not in kinds:
            raise DataError(f"{path}: pictures end in .{', .'.join(sorted(kinds))}")
        with naming_failures(path), whole_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format=kind if kind in kinds else "png")


def _document_lengths(shard: Shard) -> Iterator[np.ndarray]:
    """Tokens of each document, block by block."""
    lengths = shard.sequence_lengths
    for first in range(0, shard.num_documents, BLOCK):
        bounds = shard.document_starts(first, min(first + BLOCK, shard.num_documents))
        sums = np.cumsum(lengths[bounds[0] : bounds[-1]], dtype=np.int64)
        yield np.diff(np.concatenate([[0], sums])[bounds - bounds[0]])


def first_difference(first: Sequence[Shard], second: Sequence[Shard]) -> str | None:
    """Where two sets differ as rows of documents, however they are cut; None: nowhere."""
    pairs = zip_longest(_documents(first), _documents(second))
    for number, (one, other) in enumerate(pairs):
        if one is None or other is None:
            longer = "second" if one is None else "first"
            return f"only the {longer} has document {number:,}"
        if len(one) != len(other):
            return f"document {number:,} has {len(one):,} tokens and {len(other):,}"
        different = np.flatnonzero(one != other)
        if len(different):
            at = int(different[0])
            return f"token {at:,} of document {number:,} is {one[at]} and {other[at]}"
    return None


def _documents(shards: Sequence[Shard]) -> Iterator[np.ndarray]:
    for shard in shards:
        for number in range(shard.num_documents):
            yield shard.document(number)
