"""What Muon takes of a rank in a step: matrices that it iterates on, memory and communication."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megaegpt.config import RunConfig
from megaegpt.config.parallel import effective_zero_stage
from megaegpt.parallel.params import spec_of
from megaegpt.precision import Precision

_FP32 = 4


@dataclass(frozen=True)
class Matrix:
    """One that Muon steps."""

    rows: int
    columns: int
    """Of the whole matrix."""
    size: int
    """Elements of a tensor-parallel rank's slice."""

    @staticmethod
    def of(parameter: Tensor) -> Matrix:
        """Behind a parameter of a model."""
        rows, columns = spec_of(parameter).full_shape
        return Matrix(rows, columns, parameter.numel())

    @property
    def whole(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def is_sliced(self) -> bool:
        """Whether tensor-parallel ranks gather it."""
        return self.size < self.whole

    @property
    def iterated(self) -> int:
        """Elements while it is iterated on: itself where it was gathered, two steps of the
        iteration, and two squares of the shorter side.
        """
        return (2 + self.is_sliced) * self.whole + 2 * min(self.rows, self.columns) ** 2


@dataclass(frozen=True)
class MuonShare:
    """Of a rank; where ranks differ, of the one that has most."""

    parameters: int
    """Elements of all matrices, before they are divided among replicas."""
    matrices: tuple[Matrix, ...]
    """Those that a rank iterates on."""
    gathered: int
    """Bytes of the matrices that tensor-parallel ranks gather."""
    exchanged: int
    """Bytes of the matrices that borders of partitions cut, as they come from the replicas that
    have pieces of them, or of the pieces as they go to these, whichever are more."""
    working: int
    """Bytes beside gradients, and at ZeRO stages 1 and 2 the directions of the rank's partition: a
    matrix while it is iterated on, and the ones that were exchanged."""


@dataclass(frozen=True)
class _Piece:
    """A matrix of which a rank's partition has some."""

    matrix: Matrix
    size: int
    ranks: int
    """That have a piece of it."""

    @property
    def is_cut(self) -> bool:
        return self.ranks > 1


def share_of_muon(
    config: RunConfig, dp_size: int, precision: Precision, matrices: Sequence[Matrix]
) -> MuonShare | None:
    """Muon's share of a run; None: it has another optimizer, or no matrices that it would step.

    Several of ``optimizer.groups`` are taken for one.

    Args:
        dp_size: data-parallel ranks.
        precision: what ``auto`` has become.
        matrices: of the model, as a tensor-parallel rank has them.
    """
    if config.optimizer.kind != "muon" or not matrices:
        return None
    is_cut = effective_zero_stage(config.parallel.zero_stage, precision) > 0
    replicas = dp_size * config.parallel.context_parallel_size if is_cut else 1
    ranks = list(_partitions(matrices, replicas))
    busiest = max(ranks, key=lambda pieces: sum(operations(piece.matrix) for piece in pieces))
    direction = 0 if is_cut else _FP32 * max(matrix.size for matrix in matrices)
    return MuonShare(
        parameters=sum(matrix.size for matrix in matrices),
        matrices=tuple(piece.matrix for piece in busiest),
        gathered=_FP32 * max(map(_gathered, ranks)),
        exchanged=_FP32 * max(max(_received(pieces), _sent(pieces)) for pieces in ranks),
        working=direction + _FP32 * max(map(_working, ranks)),
    )


def operations(matrix: Matrix) -> int:
    """Of the five iterations, each with two products of the matrix and one of its square."""
    shorter, longer = sorted((matrix.rows, matrix.columns))
    return 5 * (4 * shorter**2 * longer + 2 * shorter**3)


def _partitions(matrices: Sequence[Matrix], replicas: int) -> Iterator[list[_Piece]]:
    """By rank, what DeepSpeed's equal parts, of an even number of elements, have of matrices that
    lie one behind the other.
    """
    borders = [0, *itertools.accumulate(matrix.size for matrix in matrices)]
    part = 2 * -(-borders[-1] // (2 * replicas))
    for start in range(0, borders[-1], part):
        end = min(start + part, borders[-1])
        touched = range(bisect_right(borders, start) - 1, bisect_left(borders, end))
        yield [
            _Piece(
                matrices[number],
                min(end, borders[number + 1]) - max(start, borders[number]),
                (borders[number + 1] - 1) // part - borders[number] // part + 1,
            )
            for number in touched
        ]


def _gathered(pieces: Sequence[_Piece]) -> int:
    return sum(piece.matrix.whole for piece in pieces if piece.matrix.is_sliced)


def _received(pieces: Sequence[_Piece]) -> int:
    return sum(piece.matrix.size for piece in pieces if piece.is_cut)


def _sent(pieces: Sequence[_Piece]) -> int:
    return sum(piece.size * piece.ranks for piece in pieces if piece.is_cut)


def _working(pieces: Sequence[_Piece]) -> int:
    """Elements of what was received, and of what is sent for it or iterated on then."""
    iterated = max((piece.matrix.iterated for piece in pieces), default=0)
    return _received(pieces) + max(_sent(pieces), iterated)
