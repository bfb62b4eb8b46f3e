"""Products of one input with frozen weights that have adapters of low rank beside them.

What an adapter costs is less its few operations than the passes over a layer's inputs and outputs
that they come in. Here they are added in place, and the adapters of an input share the products
that they can: one for all of the input's factors, and one for the gradient by the input. Of a
product with a few rows the tokens are always the "weight", for which oneDNN is fast.

Shapes: B batch, T tokens, I inputs, O outputs, R rank, S ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaegpt.parallel.matmul import linear


class AdaptedFactors(NamedTuple):
    """A frozen layer and its adapter."""

    weight: Tensor
    """(O, I)"""
    bias: Tensor | None
    """(O,)"""
    a: Tensor
    """(R, I)"""
    b: Tensor
    """(O, R)"""


def adapted_products(
    x: Tensor, layers: Sequence[AdaptedFactors], scale: float, dropped: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``x @ weight.T + bias + scale * x @ a.T @ b.T`` of each layer: (..., I) -> (..., O).

    The gradients are those of the inputs and of the factors a and b.

    Args:
        dropped: (..., I) what the adapters are given in place of x.
    """
    flat = (tensor for layer in layers for tensor in layer)
    return _AdaptedProducts.apply(x, dropped, scale, *flat)


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, scale: float, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b = (list(flat[i::4]) for i in range(4))
        given = x if dropped is None else dropped
        *outputs, projected = _multiply(x, given, weights, biases, a, b, scale)
        ctx.scale, ctx.drops = scale, dropped is not None
        ctx.save_for_backward(given, projected, *weights, *a, *b)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, projected, *factors = ctx.saved_tensors
        count = len(grads)
        weights, a, b = factors[:count], factors[count : 2 * count], factors[2 * count :]
        rows = [grad.flatten(0, -2) for grad in grads]
        by_projected = torch.cat(
            [linear(factor.t(), row).mul_(ctx.scale) for factor, row in zip(b, rows, strict=True)]
        )  # (S, B * T)
        by_x = by_dropped = None
        if ctx.needs_input_grad[0]:
            by_x = linear(grads[0], weights[0].t())
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                by_x += linear(grad, weight.t())
            if not ctx.drops:
                by_x.flatten(0, -2).addmm_(by_projected.t(), torch.cat(a))
        if ctx.needs_input_grad[1]:
            by_dropped = (by_projected.t() @ torch.cat(a)).view_as(given)
        ranks = [factor.shape[0] for factor in a]
        by_a = linear(by_projected, given.flatten(0, -2).t()).split(ranks)
        parts = zip(projected.split(ranks), rows, strict=True)
        by_b = [linear(part, row.t()).t() for part, row in parts]
        by_factors = [(None, None, *pair) for pair in zip(by_a, by_b, strict=True)]
        return by_x, by_dropped, None, *(grad for layer in by_factors for grad in layer)


@torch.library.custom_op("megaegpt::adapted_products", mutates_args=())
def _multiply(
    x: Tensor,
    given: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
) -> list[Tensor]:
    """The outputs (..., O), and all layers' ``scale * a @ given.T`` (S, B * T).

    One operator, so that selective recomputation keeps what comes out and not the sums before.
    """
    projected = linear(torch.cat(list(a)), given.flatten(0, -2)).mul_(scale)
    parts = projected.split([factor.shape[0] for factor in a])
    outputs = []
    for weight, bias, part, factor in zip(weights, biases, parts, b, strict=True):
        y = linear(x, weight, bias)
        y.flatten(0, -2).addmm_(part.t(), factor.t())
        outputs.append(y)
    return [*outputs, projected]


@_multiply.register_fake
def _(
    x: Tensor,
    given: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
) -> list[Tensor]:
    ranks = sum(factor.shape[0] for factor in a)
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return [*outputs, x.new_empty(ranks, x.shape[:-1].numel())]
