"""Column-parallel products of tokens that are cut over the ranks by sequence parallelism.

Shapes: B batch, T tokens, n rows of a rank, C inputs, O outputs of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megaegpt.parallel.matmul import linear
from megaegpt.parallel.sequence import SequenceShards, start_gathering, start_scattering

Factors = tuple[Tensor, Tensor | None]
"""A weight (O, C) and a bias (O,)."""


def gathered_products(
    x: Tensor, factors: Sequence[Factors], shards: SequenceShards
) -> tuple[Tensor, ...]:
    """This rank's rows (n, C) -> the products (B, T, O) of all ranks' tokens with each weight.

    As ``shards.gather`` and a product with each, but only the rows are kept for the backward pass
    (section 4.2.2 of the paper), which gathers the others again.
    """
    flat = [factor for pair in factors for factor in pair]
    return _GatheredProducts.apply(x, shards, *flat)


class _GatheredProducts(torch.autograd.Function):
    """Backward, messages are under way while products are computed that need not wait for them: the
    tokens during the gradient by the tokens, and that during the gradients of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shards: SequenceShards, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.shards = shards
        ctx.save_for_backward(x, *flat[::2])
        tokens = start_gathering(x, shards).finished()
        return tuple(
            linear(tokens, weight, bias)
            for weight, bias in zip(flat[::2], flat[1::2], strict=True)
            if weight is not None
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        gathering = start_gathering(x, ctx.shards) if any(needs[::2]) else None
        by_tokens = linear(grads[0], weights[0].t())
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            by_tokens = by_tokens + linear(grad, weight.t())
        tokens = None if gathering is None else gathering.finished().flatten(0, 1)
        scattering = start_scattering(by_tokens, ctx.shards)
        by_factors: list[Tensor | None] = []
        for number, grad in enumerate(grads):
            rows, (needs_weight, needs_bias) = grad.flatten(0, 1), needs[2 * number :][:2]
            by_weight = rows.t() @ tokens if needs_weight and tokens is not None else None
            by_factors += [by_weight, rows.sum(0) if needs_bias else None]
        return scattering.finished(), None, *by_factors
