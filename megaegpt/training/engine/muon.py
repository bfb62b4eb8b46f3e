"""Muon for the matrices of a model's blocks, AdamW for all else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes of a matrix's momentum
the nearest one with orthogonal rows or columns, by Newton-Schulz iterations, and steps along that.
It is not a function of single numbers: it needs the whole matrix, of which a tensor-parallel rank
has a slice and a rank of ZeRO stages 1 and 2 a piece of a flat partition. DeepSpeed's own Muon
takes slices for matrices, and so is another optimizer at another tensor-parallel size; here every
layout takes the same steps.

What crosses ranks in a step: of matrices that a partition's border cuts, the direction's pieces,
between those replicas alone that have one; of every matrix that is cut over tensor-parallel ranks,
its slices. Each rank then iterates on the matrices that its partition touches, and keeps its piece.
However many replicas there are, little is on a rank beside its partition: of a group's matrices no
more than two of its own are cut, the first and the last.
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
        self._pieces: Sequence[Piece | None] = []
        self._cut: dict[int, dict[int, int]] = {}
        """Of each matrix that several replicas have pieces of: by replica, the piece's size."""
        super().__init__(groups, **arguments)

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Muon's parameters, in order."""
        return self._matrices

    def follow_partition(self, of_replicas: Sequence[Sequence[Piece | None]]) -> None:
        """Tell what ranks have of the matrices under ZeRO stage 1 or 2, where the group holds one
        flat partition in their place.

        Args:
            of_replicas: by the rank in ``grid.replica_group``, its piece of each of
                :attr:`matrices`. Partitions follow each other as ranks and matrices do.
        """
        self._pieces = of_replicas[self._grid.replica_rank]
        for number, pieces in enumerate(zip(*of_replicas, strict=True)):
            sizes = {rank: piece.size for rank, piece in enumerate(pieces) if piece is not None}
            if len(sizes) > 1:
                self._cut[number] = sizes

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
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            direction = self._nesterov(parameter, parameter.grad)
            if self._pieces:
                self._step_partition(parameter, direction, numbers, group["lr"])
            else:
                parameter.add_(self._update(direction, numbers[place]), alpha=-group["lr"])

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

    def _step_partition(
        self, partition: Tensor, directions: Tensor, numbers: Sequence[int], lr: float
    ) -> None:
        """Step this rank's partition (N,) of the matrices ``numbers`` by its directions (N,), each
        matrix for itself, so that but one of them is held whole beside those that are cut.
        """
        whole = self._exchange_pieces(directions, [n for n in numbers if n in self._cut])
        for number in numbers:
            if (piece := self._pieces[number]) is None:
                continue
            inside = slice(piece.place, piece.place + piece.size)
            matrix = whole[number] if number in whole else directions[inside]
            update = self._update(matrix.view(self._shapes[number]), number).reshape(-1)
            partition[inside].add_(update[piece.first : piece.first + piece.size], alpha=-lr)
            del update  # before the next is there

    def _exchange_pieces(self, directions: Tensor, cut: Sequence[int]) -> dict[int, Tensor]:
        """Of the matrices ``cut``, those that this rank has a piece of; flat.

        One collective for all of them: one after the other, each rank would wait for the one before
        it, with which it shares its first matrix, to come to its last.
        """
        if not cut:
            return {}
        pieces = {n: piece for n in cut if (piece := self._pieces[n]) is not None}
        inside = {n: directions[p.place : p.place + p.size] for n, p in pieces.items()}
        replicas = range(self._grid.replica_size)
        shared = [[n for n in pieces if rank in self._cut[n]] for rank in replicas]
        sent = [inside[n] for numbers in shared for n in numbers]
        received = [sum(self._cut[n][rank] for n in shared[rank]) for rank in replicas]
        whole = directions.new_empty(sum(received))  # in order, as partitions are
        dist.all_to_all_single(
            whole,
            torch.cat(sent) if sent else directions.new_empty(0),
            received,
            [sum(pieces[n].size for n in numbers) for numbers in shared],
            group=self._grid.replica_group,
        )
        sizes = [self._shapes[n].numel() for n in pieces]
        return dict(zip(pieces, whole.split(sizes), strict=True))

    def _update(self, direction: Tensor, number: int) -> Tensor:
        """Matrix ``number``'s update, this rank's slice of it as ``direction`` is."""
        spec = self._specs[number]
        whole = orthogonalized(unshard(direction, spec, self._grid))
        return shard(whole, spec, self._grid) * update_scale(*whole.shape)
