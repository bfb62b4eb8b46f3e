"""The row-parallel product whose result sequence parallelism scatters over the ranks.

Shapes: B batch, T tokens, n rows of a rank, I inputs of this rank, C outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaegpt.parallel.matmul import linear
from megaegpt.parallel.sequence import SequenceShards, start_gathering, start_scattering_rows


def scattered_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, shards: SequenceShards
) -> Tensor:
    """(B, T, I) and a weight (C, I) -> this rank's rows (n, C) of the sum of all ranks' products,
    to which a replicated bias (C,) is added.

    As a product and ``shards.scatter``. But a rank's product has all rows, and selective
    recomputation, which keeps products, would keep it: this one is written where the message reads
    it, by an operator that it does not know, and computed again.
    """
    return _ScatteredProduct.apply(x, weight, bias, shards)


class _ScatteredProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shards: SequenceShards
    ) -> Tensor:
        ctx.shards = shards
        ctx.save_for_backward(x, weight)
        rows = x.flatten(0, 1)
        partial = x.new_empty(shards.grid.tp_size * shards.rows, weight.shape[0])
        torch.mm(rows, weight.t(), out=partial[: rows.shape[0]])
        partial[rows.shape[0] :].zero_()
        own = start_scattering_rows(partial, shards).finished()
        return own if bias is None else own.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = start_gathering(grads[0], ctx.shards).finished()
        rows = grad.flatten(0, 1)
        return (
            linear(grad, weight.t()) if needs_x else None,
            rows.t() @ x.flatten(0, 1) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )
