"""What a block of GPT-2's kind computes around its products, reading each tensor once.

Operator by operator such a block moves 57 numbers a token and column beside its products and its
attention: each sum of gradients, each bias's gradient and GELU are passes over memory of their own.
Here

- a norm also gives its input with the bias added that the coming product's result has, and that
  product is added to it in place (cuBLAS adds as it writes): no pass for the residual stream;
- a norm's backward pass adds the residual stream's gradient, and sums the gradients of its weight,
  its bias and the product's bias, while it has the rows at hand;
- GELU, its derivative and the sums for its bias are part of their products' own kernels;
- gradients by the input of queries, keys and values are added up by their products in place.

17 numbers are left. On CUDA the kernels are Triton's (``block_kernels``); elsewhere the same is
done operator by operator, which is what they are tested against. They are operators of torch's so
that counters, traces of memory and fake tensors see each as one.

Shapes: ... rows of any number of dimensions, C columns, F columns of the MLP, p parts of sums.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from megaegpt.errors import first_line
from megaegpt.parallel.compiling import Trial

TILE_ROWS = 128
"""Rows of a product's tile, each of which leaves one part of its columns' sums."""
_MOST_PARTS = 528
"""Programs that share the rows of a norm's backward pass: four for each multiprocessor of an
H100."""


def parts_of_rows(rows: int) -> int:
    """Programs of a norm's backward pass."""
    return min(rows, _MOST_PARTS)


@torch.library.custom_op(
    "megaegpt::norm_and_shift",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? shift, float eps) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    ),
)
def norm_and_shift(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of rows, and the rows with something added.

    Args:
        x: (..., C).
        weight: (C,), and ``bias``, of the norm.
        shift: (C,) to be added to each row.
        eps: added to the variance.

    Returns:
        The norm and the shifted rows, (..., C) each; the rows' means and the inverses of their
        deviations, (..., 1) each in at least fp32.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(precise)
    means = wide.mean(-1, keepdim=True)
    scales = (wide.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    shifted = x.clone() if shift is None else (wide + shift).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps), shifted, means, scales


@norm_and_shift.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    precise = torch.promote_types(x.dtype, torch.float32)
    means, scales = (x.new_empty(*x.shape[:-1], 1, dtype=precise) for _ in range(2))
    return torch.empty_like(x), torch.empty_like(x), means, scales


@norm_and_shift.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from megaegpt.parallel.block_kernels import launch_norm

    return launch_norm(*arguments)


@torch.library.custom_op(
    "megaegpt::norm_and_shift_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_normed, Tensor grad_shifted, Tensor x, Tensor weight, Tensor means, "
        "Tensor scales) -> (Tensor, Tensor)"
    ),
)
def norm_and_shift_backward(
    grad_normed: Tensor,
    grad_shifted: Tensor,
    x: Tensor,
    weight: Tensor,
    means: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`norm_and_shift`, whose arguments and results these are.

    Returns:
        The gradient by ``x``; and (p, 3, C) in at least fp32, parts of the sums that are the
        gradients by weight, bias and shift.
    """
    grad, along = grad_normed.to(means.dtype), grad_shifted.to(means.dtype)
    unit = (x.to(means.dtype) - means) * scales
    scaled = grad * weight
    inner = (scaled * unit).mean(-1, keepdim=True)
    grad_x = (scaled - scaled.mean(-1, keepdim=True) - unit * inner) * scales + along
    sums = [rows.flatten(0, -2).sum(0) for rows in (grad * unit, grad, along)]
    return grad_x.to(x.dtype), torch.stack(sums).unsqueeze(0)


@norm_and_shift_backward.register_fake
def _(
    grad_normed: Tensor, grad_shifted: Tensor, x: Tensor, weight: Tensor, means: Tensor, *more: Any
) -> tuple[Tensor, Tensor]:
    parts = parts_of_rows(means.numel())
    return torch.empty_like(x), means.new_empty(parts, 3, x.shape[-1])


@norm_and_shift_backward.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from megaegpt.parallel.block_kernels import launch_norm_backward

    return launch_norm_backward(*arguments)


@torch.library.custom_op(
    "megaegpt::product_gelu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool tanh) -> (Tensor, Tensor)",
)
def product_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """``x @ weight.T + bias`` and its GELU.

    Args:
        x: (..., C).
        weight: (F, C).
        bias: (F,).
        tanh: GELU is the approximation by a hyperbolic tangent.

    Returns:
        (..., F) each.
    """
    before = F.linear(x, weight, bias)
    return before, F.gelu(before, approximate=_approximation(tanh))


@product_gelu.register_fake
def _(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    before, after = (x.new_empty(*x.shape[:-1], weight.shape[0]) for _ in range(2))
    return before, after


@product_gelu.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from megaegpt.parallel.block_kernels import launch_product_gelu

    return launch_product_gelu(*arguments)


@torch.library.custom_op(
    "megaegpt::product_gelu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor before, bool tanh) -> (Tensor, Tensor)",
)
def product_gelu_backward(
    grad: Tensor, weight: Tensor, before: Tensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    """From the gradient behind the product that follows GELU to the one before GELU.

    Args:
        grad: (..., C).
        weight: (C, F) of that product.
        before: (..., F) what GELU was given.
        tanh: see :func:`product_gelu`.

    Returns:
        ``grad @ weight`` times GELU's derivative, (..., F); and (p, F) in at least fp32, parts of
        its sums over all rows.
    """
    products = F.linear(grad, weight.t())
    approximate = _approximation(tanh)
    result = torch.ops.aten.gelu_backward(products, before, approximate=approximate)
    precise = torch.promote_types(grad.dtype, torch.float32)
    return result, result.flatten(0, -2).sum(0, keepdim=True, dtype=precise)


@product_gelu_backward.register_fake
def _(grad: Tensor, weight: Tensor, before: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(grad.dtype, torch.float32)
    parts = -(-before.numel() // (TILE_ROWS * weight.shape[1]))
    return torch.empty_like(before), grad.new_empty(parts, weight.shape[1], dtype=precise)


@product_gelu_backward.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    from megaegpt.parallel.block_kernels import launch_product_gelu_backward

    return launch_product_gelu_backward(*arguments)


@register_flop_formula([torch.ops.megaegpt.product_gelu, torch.ops.megaegpt.product_gelu_backward])
def _flops(rows: torch.Size, weight: torch.Size, *arguments: Any, **options: Any) -> int:
    return 2 * rows.numel() * weight.numel() // rows[-1]


def _approximation(tanh: bool) -> str:
    return "tanh" if tanh else "none"


def normed_and_shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`norm_and_shift` with gradients: (..., C) -> its norm and ``x + shift``."""
    return _NormAndShift.apply(x, weight, bias, shift, eps)


class _NormAndShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, shifted, means, scales = norm_and_shift(x, weight, bias, shift, eps)
        ctx.save_for_backward(x, weight, means, scales)
        return normed, shifted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, means, scales = ctx.saved_tensors
        grad_x, sums = norm_and_shift_backward(*grads, x, weight, means, scales)
        by_parameter = sums.sum(0).to(weight.dtype).unbind()
        needed = zip(by_parameter, ctx.needs_input_grad[1:4], strict=True)
        return grad_x, *(grad if needs else None for grad, needs in needed), None


def add_product_(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``residual + x @ weight.T`` in the place of ``residual``, which nobody else may use; with
    gradients. (..., O), (..., I), (O, I) -> (..., O)
    """
    return _AddProduct.apply(residual, x, weight)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.mark_dirty(residual)
        ctx.save_for_backward(x, weight)
        return _added_(residual, x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_weight = _by_weight(grads[0], x) if ctx.needs_input_grad[2] else None
        return grads[0], F.linear(grads[0], weight.t()), grad_weight


def add_gelu_mlp_(
    residual: Tensor, x: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, *, tanh: bool
) -> Tensor:
    """``residual + gelu(x @ up.T + bias) @ down.T`` in the place of ``residual``, with gradients.

    (..., C), (..., C), (F, C), (F,), (C, F) -> (..., C)
    """
    return _AddGeluMLP.apply(residual, x, up, bias, down, tanh)


class _AddGeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor,
        up: Tensor,
        bias: Tensor | None,
        down: Tensor,
        tanh: bool,
    ) -> Tensor:
        before, after = product_gelu(x, up, bias, tanh)
        ctx.mark_dirty(residual)
        ctx.save_for_backward(x, before, after, up, down)
        ctx.tanh = tanh
        return _added_(residual, after, down.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, before, after, up, down = ctx.saved_tensors
        _, _, needs_up, needs_bias, needs_down, _ = ctx.needs_input_grad
        grad_down = _by_weight(grads[0], after) if needs_down else None
        grad_before, sums = product_gelu_backward(grads[0], down, before, ctx.tanh)
        grad_up = _by_weight(grad_before, x) if needs_up else None
        grad_bias = sums.sum(0).to(up.dtype) if needs_bias else None
        return grads[0], F.linear(grad_before, up.t()), grad_up, grad_bias, grad_down, None


def project(x: Tensor, *layers: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """Products of one input with several weights (O, C) and biases (O,), with gradients: (..., C)
    -> (..., O) each.
    """
    return _Project.apply(x, *(parameter for layer in layers for parameter in layer))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights = [weight for weight in parameters[::2] if weight is not None]
        ctx.save_for_backward(x, *weights)
        return tuple(
            F.linear(x, weight, bias)
            for weight, bias in zip(weights, parameters[1::2], strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, first, *others = ctx.saved_tensors
        grad_x = F.linear(grads[0], first.t())
        for grad, weight in zip(grads[1:], others, strict=True):
            _added_(grad_x, grad, weight)
        by_parameter: list[Tensor | None] = []
        needs = ctx.needs_input_grad[1:]
        for grad, needs_weight, needs_bias in zip(grads, needs[::2], needs[1::2], strict=True):
            by_parameter.append(_by_weight(grad, x) if needs_weight else None)
            by_parameter.append(grad.flatten(0, -2).sum(0) if needs_bias else None)
        return grad_x, *by_parameter


def _added_(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``total += x @ weight``: (..., O), (..., I), (I, O)"""
    total.view(-1, total.shape[-1]).addmm_(x.flatten(0, -2), weight)
    return total


def _by_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a product's weight: (..., O), (..., I) -> (O, I)"""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _try_kernels(device_type: str) -> str | None:
    """Why the kernels cannot be used on a device, or should not be: there is no Triton, they do not
    run, or they compute something else; None: nothing is wrong.

    Runs each of them once on little data, which takes seconds, once a process.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        check_kernels(device_type)
    except Exception as error:  # whatever Triton and the compilers beneath it raise
        return f"{type(error).__name__}: {first_line(error)}"
    return None


kernel_problem = Trial(_try_kernels)


def check_kernels(device_type: str) -> None:
    """Compare the operators on a device in bf16 with those on the CPU in fp32.

    Raises:
        AssertionError: they differ by more than bf16 rounds.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    rows, columns, width = 272, 144, 400  # not whole tiles, in steps of 16 as real sizes have them
    x, grad, along = (draw(rows, columns).bfloat16() for _ in range(3))
    weight, bias = draw(columns).bfloat16(), draw(columns).bfloat16()
    up, before = draw(width, columns).bfloat16(), draw(rows, width).bfloat16()
    means, scales = norm_and_shift(x.float(), weight.float(), None, None, 1e-5)[2:]
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (norm_and_shift, (x, weight, bias, bias, 1e-5)),
        (norm_and_shift_backward, (grad, along, x, weight, means, scales)),
        (product_gelu, (x, up, before[0], True)),
        (product_gelu_backward, (grad, up.t().contiguous(), before, True)),
    ]
    for function, arguments in calls:
        found = function(*(_moved(a, device_type) for a in arguments))
        wide = function(*(a.float() if isinstance(a, Tensor) else a for a in arguments))
        for result, expected in zip(found, wide, strict=True):
            result = result.float().cpu()
            if result.shape != expected.shape:  # parts of sums
                result, expected = result.sum(0), expected.sum(0)
            close = 2**-7 * float(expected.abs().max())
            torch.testing.assert_close(result, expected, rtol=2**-7, atol=close)


def _moved(argument: Any, device_type: str) -> Any:
    return argument.to(device_type) if isinstance(argument, Tensor) else argument
