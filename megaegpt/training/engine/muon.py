"""Muon for the matrices of a model's blocks, AdamW for all else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes of a matrix's momentum
the nearest one with orthogonal rows or columns, by Newton-Schulz iterations, and steps along that.
It is not a function of single numbers: it needs the whole matrix, of which a tensor-parallel rank
has a slice and a rank of ZeRO stages 1 and 2 a piece of a flat partition. DeepSpeed's own Muon
takes slices for matrices, and so is another optimizer at another tensor-parallel size; here every
layout takes the same steps.

What crosses ranks in a step: of matrices that a partition's border cuts, the direction, summed over
data-parallel ranks; of every matrix that is cut over tensor-parallel ranks, its slices. Each rank
then iterates on the matrices that its partition touches, and keeps its piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import shard, spec_of, unshard
from megaegpt.parallel.together import all_gather_object

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen by Jordan for its slope at 0."""
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
_RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's updates, as Liu et al. measured it."""


def orthogonalized(matrix: Tensor) -> Tensor:
    """(R, C) -> U V^T of its singular value decomposition, but for singular values of 0.7 to 1.2.

    On a GPU the products are in bf16, as Jordan's are, elsewhere in the matrix's own precision.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def update_scale(rows: int, columns: int) -> float:
    """What an orthogonal matrix is multiplied by, so that its root mean square is that of AdamW's
    updates, and learning rate and weight decay are AdamW's (Liu et al., arXiv 2502.16982, section
    2.2).
    """
    return _RMS_OF_ADAMW * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class Piece:
    """The numbers of a matrix, or of its slice, that are in this rank's partition."""

    first: int
    """Number of the first of them in the slice."""
    place: int
    """Of the first in the partition."""
    size: int


class Muon(torch.optim.AdamW):
    """Muon for groups that say ``muon``, AdamW for the others.

    Args:
        groups: parameter groups with the ``names`` of their parameters; those that have ``muon``
            hold matrices only.
        grid: matrices are put together over its groups.
        momentum: decay of the mean of gradients, which is Nesterov's.
        arguments: AdamW's.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        grid: ProcessGrid,
        momentum: float,
        **arguments: Any,
    ) -> None:
        self._grid, self._momentum = grid, momentum
        self._matrices = [p for group in groups if group["muon"] for p in group["params"]]
        self._specs = [spec_of(p) for p in self._matrices]
        self._shapes = [p.shape for p in self._matrices]
        names = [name for group in groups if group["muon"] for name in group["names"]]
        self._numbers = {name: number for number, name in enumerate(names)}
        self._pieces: list[Piece | None] = []
        self._cut: set[int] = set()
        super().__init__(groups, **arguments)

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Muon's parameters, in order."""
        return self._matrices

    def follow_partition(self, pieces: Sequence[Piece | None]) -> None:
        """Tell what this rank has of each matrix under ZeRO stage 1 or 2, where the group holds one
        flat partition in their place. Collective over all ranks.
        """
        self._pieces = list(pieces)
        sizes = [piece.size if piece else 0 for piece in pieces]
        of_ranks = all_gather_object(sizes, self._grid)
        self._cut = {
            number
            for number, shape in enumerate(self._shapes)
            if max(sizes[number] for sizes in of_ranks) < shape.numel()
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all groups, or the ones that DeepSpeed has put in their place. Collective."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        numbers = [self._numbers[name] for name in group["names"]]
        for place, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            direction = self._nesterov(parameter, parameter.grad)
            if self._pieces:
                update = self._updates_of_partition(direction, numbers)
            else:
                update = self._update(direction, numbers[place])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _nesterov(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Add the gradient to the mean, and return the mean one step ahead."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            # AdamW's name for it, by which DeepSpeed takes it to other topologies.
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - self._momentum)
        return gradient.lerp(mean, self._momentum)

    def _updates_of_partition(self, directions: Tensor, numbers: Sequence[int]) -> Tensor:
        """(N,) this rank's partition of the directions of the matrices ``numbers`` -> the same of
        updates; padding gets none.
        """
        updates = torch.zeros_like(directions)
        whole = self._join_cut(directions, [n for n in numbers if n in self._cut])
        for number in numbers:
            if (piece := self._pieces[number]) is None:
                continue
            inside = slice(piece.place, piece.place + piece.size)
            matrix = whole[number] if number in whole else directions[inside]
            update = self._update(matrix.view(self._shapes[number]), number).reshape(-1)
            updates[inside] = update[piece.first : piece.first + piece.size]
        return updates

    def _join_cut(self, directions: Tensor, numbers: Sequence[int]) -> dict[int, Tensor]:
        """The matrices ``numbers``, which no replica has whole; flat."""
        if not numbers:
            return {}
        sizes = [self._shapes[number].numel() for number in numbers]
        joined = directions.new_zeros(sum(sizes))
        whole = dict(zip(numbers, joined.split(sizes), strict=True))
        for number, matrix in whole.items():
            if (piece := self._pieces[number]) is not None:
                inside = directions[piece.place : piece.place + piece.size]
                matrix[piece.first : piece.first + piece.size] = inside
        dist.all_reduce(joined, group=self._grid.replica_group)
        return whole

    def _update(self, direction: Tensor, number: int) -> Tensor:
        """Matrix ``number``'s update, this rank's slice of it as ``direction`` is."""
        spec = self._specs[number]
        whole = orthogonalized(unshard(direction, spec, self._grid))
        return shard(whole, spec, self._grid) * update_scale(*whole.shape)
