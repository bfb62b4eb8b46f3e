"""Products with weights, in fp32 on a CPU by oneDNN.

torch's own fp32 products on a CPU are MKL's, and oneDNN's only in bf16. MKL takes narrower vector
instructions on AMD's processors than they have (docs/benchmarks.md has the figures). With few rows,
as in decoding, it is the faster one on other processors: a model that is only for inference is told
by ``kernels``, which measures it. What reaches the weight's own gradient stays MKL's: oneDNN would
transpose both factors first.

Shapes: (..., I) rows, (O, I) weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.parallel.int8_weights import Int8Weight
from megaegpt.parallel.partitions import is_partitioned

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch has oneDNN's products."""

SMALLEST = 1 << 18
"""Numbers of a weight from which on oneDNN's 12 microseconds a call are worth it."""

MOST_GENERATED_ROWS = 4
"""Rows up to which a product is faster on a CPU as generated code than oneDNN's, as measured on an
AMD EPYC: to compile it takes tens of seconds, so no machine measures it for itself."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: Tensor | Int8Weight | None = None,
    blas_rows: frozenset[int] = frozenset(),
) -> Tensor:
    """``x @ weight.T + bias``, (..., I) -> (..., O), as ``F.linear``, also in its gradients.

    Args:
        packed: the weight in :func:`packed_order`, or in int8 in place of it; a product with it has
            no gradients.
        blas_rows: numbers of rows with which torch's own product is taken, without gradients.
    """
    if isinstance(packed, Int8Weight):
        return packed.product(x, bias, linear)
    if torch.compiler.is_compiling():  # the compiler chooses kernels, but for few rows
        few = 0 < x.numel() <= MOST_GENERATED_ROWS * x.shape[-1] and x.device.type == "cpu"
        if few and not torch.is_grad_enabled():
            return _by_dot_products(x, weight, bias)
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled() and x.numel() // x.shape[-1] in blas_rows:
        return F.linear(x, weight, bias)
    if packed is not None:
        return onednn_linear(x, packed, bias)
    if not _is_foronednn_linear(x, weight):
        if torch.is_grad_enabled() and is_partitioned(weight):
            return _Linear.apply(x, weight, bias, F.linear)
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, onednn_linear)
    return onednn_linear(x, weight, bias)


def packed_order(weight: Tensor) -> Tensor | None:
    """A copy of ``weight`` in the order in which oneDNN reads it with few rows, for inference; None
    where it gains nothing (in fp32 oneDNN is as fast without) or oneDNN has no product for it.
    """
    is_bf16 = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not is_bf16 or not onednn_is_available(torch.bfloat16):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)


def _by_dot_products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with few rows as code to be generated, which reads the weight once and nearly at
    the memory's speed: it adds up several sums side by side, since a single one waits for itself.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = math.gcd(MOST_GENERATED_ROWS // len(rows), weight.shape[0])
    parts = weight.chunk(count)  # of one size, or they would not become one loop
    y = torch.cat([torch.stack([(part * row).sum(-1) for row in rows]) for part in parts], -1)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


def _is_foronednn_linear(x: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and weight.numel() >= SMALLEST
    )


def onednn_is_available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch has oneDNN's products, and for bf16 the processor what they need
    (AVX-512; without it torch raises).
    """
    if not HAS_ONEDNN:
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's product, whatever its size; no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """``F.linear`` by another product; and with one that keeps the weight itself for the backward
    pass. torch's own keeps a transposed view of it, with which a weight that ZeRO stage 3 has
    gathered would stay in memory after its layer's forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: Callable[..., Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grads[0].reshape(-1, weight.shape[0])
        of_x = ctx.product(grads[0], weight.t()) if needs_x else None
        of_weight = rows.t() @ x.reshape(-1, weight.shape[1]) if needs_weight else None
        return of_x, of_weight, rows.sum(0) if needs_bias else None, None
