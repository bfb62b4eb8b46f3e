"""Instruction data as rows for the training loop: one record a row, or several packed.

Shapes: n rows, T tokens predicted in a row.
"""

from __future__ import annotations

import bisect
import hashlib
from functools import cached_property

import numpy as np

from megaegpt.data.instruction.records import InstructionDataset
from megaegpt.data.tokens.batch import Arrays, Batch
from megaegpt.data.tokens.permutation import EpochOrder, Permutation
from megaegpt.errors import DataError
from megaegpt.labels import IGNORE, PADDING


class InstructionSamples:
    """Rows of T tokens, with their answers as targets, and where rows are packed, the record that
    each token belongs to.

    Packed rows are made once, from the records in an order drawn by ``seed``: each goes into the
    fullest row that has room for it (best fit). An epoch visits every row once, in an order of its
    own, so a row is a function of (seed, sample number).

    Args:
        dataset: records of at most T + 1 tokens, their ends included.
        sample_len: T.
        seed: of packing and of the order.
        packing: several records in a row.

    Raises:
        DataError: the dataset is empty.
    """

    def __init__(
        self, dataset: InstructionDataset, sample_len: int, seed: int, packing: bool = False
    ) -> None:
        if not len(dataset):
            raise DataError(f"no record has a prompt and an answer within {sample_len} tokens")
        self._items = [
            tuple(tensor.numpy() for tensor in dataset[item]) for item in range(len(dataset))
        ]
        self._sample_len = sample_len
        self._packing = packing
        self._pad_token = dataset.pad_token
        self._lengths = [len(tokens) + 1 for tokens, _ in self._items]  # with the end
        self.rows = [[item] for item in range(len(dataset))]
        if packing:
            order = Permutation(len(dataset), (seed, 0, 2))(np.arange(len(dataset)))
            self.rows = pack(order.tolist(), self._lengths, sample_len + 1)
        self._order = EpochOrder(len(self.rows), seed)

    def __len__(self) -> int:
        """Rows an epoch."""
        return len(self.rows)

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens that a row has, padding not counted."""
        return sum(self._lengths) / len(self.rows)

    @property
    def longest_row(self) -> int:
        """Most tokens that a row has, of those that something is predicted from."""
        return max(sum(self._lengths[item] for item in row) for row in self.rows) - 1

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Rows by global sample number; see :meth:`read`."""
        return self.read(self._order(numbers))

    def read(self, rows: np.ndarray) -> Arrays:
        """Rows by their own number.

        Returns:
            ``tokens`` (n, T), filled up with end-of-text; ``targets`` (n, T), -100 but for what is
            learned; and, if rows are packed, ``segments`` (n, T).
        """
        shape = (len(rows), self._sample_len)
        tokens = np.full((len(rows), self._sample_len + 1), self._pad_token, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        segments = np.full(shape, PADDING, np.int64)
        for row, number in enumerate(rows.tolist()):
            start = 0
            for segment, item in enumerate(self.rows[number]):
                inputs, answers = self._items[item]
                end = start + len(inputs)
                tokens[row, start:end] = inputs
                tokens[row, end] = answers[-1]
                targets[row, start:end] = answers
                segments[row, start : end + 1] = segment
                start = end + 1
        batch = {"tokens": np.ascontiguousarray(tokens[:, :-1]), "targets": targets}
        return batch | {"segments": segments} if self._packing else batch

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the records' tokens, and of how they are laid out."""
        digest = hashlib.sha256(f"{self._sample_len} {self._packing}".encode())
        for arrays in self._items:
            for array in arrays:
                digest.update(array.tobytes())
        return digest.hexdigest()


class InstructionWindows:
    """All rows in order, each once, for an evaluation."""

    def __init__(self, samples: InstructionSamples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        """Rows."""
        return len(self._samples)

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Rows by number."""
        return self._samples.read(numbers)


def trim_padding(batch: Batch, multiple_of: int) -> Batch:
    """Without the columns behind the last target of any row, but for what makes the width a
    multiple of ``multiple_of`` (a chunk, for egpt and deepgpt).
    """
    targets = batch["targets"]
    learned = (targets != IGNORE).any(0)
    used = int(learned.nonzero()[-1]) + 1 if learned.any() else 1
    width = min(-(-used // multiple_of) * multiple_of, targets.shape[1])
    return {name: rows[:, :width] for name, rows in batch.items()}


def pack(items: list[int], lengths: list[int], room: int) -> list[list[int]]:
    """Put items one after the other, each into the fullest row that it fits in, else a new one.

    Args:
        items: numbers, in the order in which they are placed.
        lengths: of each item by its number, at most ``room``.
        room: of a row.

    Example:
        >>> pack([0, 1, 2, 3], lengths=[6, 5, 4, 5], room=10)
        [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left and number of each row, sorted
    for item in items:
        place = bisect.bisect_left(free, (lengths[item], -1))
        if place == len(free):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = free.pop(place)
        rows[row].append(item)
        bisect.insort(free, (left - lengths[item], row))
    return rows
