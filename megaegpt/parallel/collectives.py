"""Megatron's conjugate operators f and g (Shoeybi et al., arXiv 1909.08053, section 3) and a
gather.

Each is the identity where tensor_parallel_size is 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.parallel.grid import ProcessGrid


class _CopyToTP(torch.autograd.Function):
    """f: identity forward, sum of the gradients over TP backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ProcessGrid) -> Tensor:
        ctx.grid = grid
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A copy, since autograd may hand one gradient to several functions.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.grid.tp_group)
        return grad, None


class _ReduceFromTP(torch.autograd.Function):
    """g: sum over TP forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ProcessGrid) -> Tensor:
        # A copy, since selective recomputation keeps the product that ``x`` is.
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=grid.tp_group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_tp(x: Tensor, grid: ProcessGrid) -> Tensor:
    """Enter a sharded region with a replicated tensor (activation, or a weight each rank uses a
    part of).
    """
    return x if grid.tp_group is None else _CopyToTP.apply(x, grid)


def reduce_from_tp(x: Tensor, grid: ProcessGrid) -> Tensor:
    """Leave a sharded region: the sum of the ranks' partial results, replicated.

    Without gradients the sum takes the place of ``x``, which nobody else may use.
    """
    if grid.tp_group is None:
        return x
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _ReduceFromTP.apply(x, grid)
    x = x.contiguous()
    dist.all_reduce(x, group=grid.tp_group)
    return x


def gather_from_tp(x: Tensor, grid: ProcessGrid) -> Tensor:
    """Concatenate the ranks' columns (for inference: no gradient flows through it)."""
    if grid.tp_group is None:
        return x
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(grid.tp_size)]
    dist.all_gather(parts, x, group=grid.tp_group)
    return torch.cat(parts, dim=-1)
