"""Sequence parallelism (Korthikanti et al., arXiv 2205.05198): between the sharded layers of a
tensor-parallel group, where every rank would compute and keep the same, each has its own tokens.

Norms, dropout and residuals act on single tokens. So the tokens of a pass are one list of rows of
which each rank has a part; an all-gather before the column-parallel layers and a reduce-scatter
behind the row-parallel ones take the place of the all-reduce, and move as many bytes. A rank then
knows only its tokens' part of the gradients of what acts on them: :meth:`SequenceShards.shared` and
:meth:`SequenceShards.scatter` have them summed before they reach the parameter, and so before ZeRO
and the gradient norm see them.

Shapes: B batch, T tokens, n = ceil(B * T / tp) rows of a rank, C features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaegpt.parallel.collectives import copy_to_tp
from megaegpt.parallel.grid import ProcessGrid

# The names of before torch 2.13, which warns of them.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class SequenceShards:
    """Which tokens of a pass each rank of a tensor-parallel group has.

    Rank r has the r-th n rows of the B * T tokens in order. Where they do not divide, zeros follow
    the last token, and nothing is read of them.
    """

    grid: ProcessGrid
    """With a tensor-parallel group."""
    batch: int
    """B"""
    length: int
    """T"""
    keeps_rows: bool = False
    """Column-parallel layers keep their input's rows only, and gather the others again for their
    gradients."""

    @property
    def rows(self) -> int:
        """n"""
        return -(-self.batch * self.length // self.grid.tp_size)

    def own(self, x: Tensor) -> Tensor:
        """(B, T, ...) without a gradient, the same on every rank -> (n, ...) of this rank.

        A copy: a view would keep the whole of ``x`` for the backward pass.
        """
        return _own_rows(x.flatten(0, 1), self).clone()

    def gather(self, x: Tensor) -> Tensor:
        """Enter a sharded region: (n, C) -> (B, T, C). Backward, the ranks' gradients are summed,
        and each has those of its rows.
        """
        return _GatherRows.apply(x, self)

    def scatter(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Leave a sharded region: partial results (B, T, C) of every rank -> (n, C) of their sum,
        to which a replicated bias (C,) is added.

        The gradient of all rows is gathered for the region anyway: that of the bias is their sum.
        """
        return _ScatterRows.apply(x, bias, self)

    def whole(self, x: Tensor) -> Tensor:
        """(n, C) -> (B, T, C) for what every rank computes alike, and has the whole gradient of."""
        return _WholeRows.apply(x, self)

    def shared(self, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
        """Replicated parameters for use on a rank's own rows; their gradients are summed over the
        ranks, in one message.
        """
        given = [parameter for parameter in parameters if parameter is not None]
        if len(given) < 2:
            return tuple(None if p is None else copy_to_tp(p, self.grid) for p in parameters)
        copies = iter(_CopyAllToTP.apply(self.grid, *given))
        return tuple(None if p is None else next(copies) for p in parameters)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """(n, C) -> (n, C), dropped as every rank would drop the (B, T, C) of all tokens."""
        mask = F.dropout(x.new_ones(self.batch, self.length, x.shape[-1]), probability)
        return x * self.own(mask)


def enter_tp(x: Tensor, grid: ProcessGrid, shards: SequenceShards | None) -> Tensor:
    """Enter a sharded region with activations (..., C) that are the same on every rank, or with its
    own rows of them (n, C) -> (B, T, C).
    """
    return copy_to_tp(x, grid) if shards is None else shards.gather(x)


def dropout(x: Tensor, probability: float, training: bool, shards: SequenceShards | None) -> Tensor:
    """Drop numbers of activations that are the same on every rank, or of its own rows of them: the
    same numbers of a token.
    """
    if shards is None or not training or probability == 0:
        return F.dropout(x, probability, training)
    return shards.dropout(x, probability)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: SequenceShards) -> Tensor:
        ctx.shards = shards
        return start_gathering(x, shards).finished()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return start_scattering(grads[0], ctx.shards).finished(), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shards: SequenceShards) -> Tensor:
        ctx.shards = shards
        own = start_scattering(x, shards).finished()
        return own if bias is None else own + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad = start_gathering(grads[0], ctx.shards).finished()
        return grad, grad.sum((0, 1)) if ctx.needs_input_grad[1] else None, None


class _WholeRows(_GatherRows):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _own_rows(grads[0].flatten(0, 1), ctx.shards), None


class _CopyAllToTP(torch.autograd.Function):
    """``copy_to_tp`` of several tensors of one type: a single all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, grid: ProcessGrid, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.grid = grid
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=ctx.grid.tp_group)
        parts = flat.split([grad.numel() for grad in grads])
        return None, *(part.view_as(x) for part, x in zip(parts, grads, strict=True))


def _own_rows(rows: Tensor, shards: SequenceShards) -> Tensor:
    """(B * T, ...) -> (n, ...)"""
    start = shards.grid.tp_rank * shards.rows
    own = rows[start : start + shards.rows]
    missing = shards.rows - own.shape[0]
    if not missing:
        return own
    return torch.cat([own, own.new_zeros(missing, *own.shape[1:])])


@dataclass(frozen=True)
class Message:
    """A collective that is under way."""

    result: Tensor
    work: dist.Work | None

    def finished(self) -> Tensor:
        """What it gives; on a GPU the stream waits for it, not the program."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_gathering(x: Tensor, shards: SequenceShards) -> Message:
    """(n, C) -> (B, T, C)"""
    everything = x.new_empty(shards.grid.tp_size * shards.rows, x.shape[1])
    work = all_gather_single(everything, x.contiguous(), shards.grid.tp_group, _may_be_under_way())
    tokens = everything[: shards.batch * shards.length]
    return Message(tokens.view(shards.batch, shards.length, -1), work)


def start_scattering(x: Tensor, shards: SequenceShards) -> Message:
    """(B, T, C) -> (n, C) of the sum over ranks"""
    rows = x.flatten(0, 1)
    missing = shards.grid.tp_size * shards.rows - rows.shape[0]
    if missing:
        rows = F.pad(rows, (0, 0, 0, missing))
    return start_scattering_rows(rows.contiguous(), shards)


def start_scattering_rows(rows: Tensor, shards: SequenceShards) -> Message:
    """(tp * n, C), zeros behind the last token, -> (n, C) of the sum over ranks"""
    own = rows.new_empty(shards.rows, rows.shape[1])
    work = reduce_scatter_single(
        own, rows, group=shards.grid.tp_group, async_op=_may_be_under_way()
    )
    return Message(own, work)


def _may_be_under_way() -> bool:
    """Not in compiled code, of whose collectives the compiler decides when they are waited for."""
    return not torch.compiler.is_compiling()
