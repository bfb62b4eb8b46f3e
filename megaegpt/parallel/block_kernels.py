"""Triton kernels of what a block computes around its products; ``block_operators`` launches them.

A kernel is what one program of many does, for some rows or for one tile of the result. Everything
is computed in fp32 and rounded where it is stored. Sums over all rows are left in parts, one for
each program or tile of rows, so that nothing depends on the order in which programs end.

Shapes: n rows, C columns of the norms; (n, K) times (K, N) of the products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaegpt.parallel.block_operators import TILE_ROWS, parts_of_rows

_TILES = [
    triton.Config(
        {"tile_rows": TILE_ROWS, "tile_columns": columns, "tile_depth": depth},
        warps,
        num_stages=stages,
    )
    for columns, depth, warps, stages in (
        (128, 32, 8, 4),
        (128, 64, 8, 4),
        (256, 64, 8, 3),
        (256, 64, 8, 4),
    )
]
"""Tiles among which the fastest is taken for each shape of weights; those that a GPU's shared
memory cannot hold are left out. The first fits every GPU."""
_tuned = triton.autotune(_TILES, key=["width", "depth"])


@triton.jit
def _norm_rows(
    x, weight, bias, shift, normed, shifted, means, scales, columns, eps, block: tl.constexpr
):  # fmt: skip
    """Of one row: its norm, and the row with ``shift`` added; both biases may be None."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < columns
    place = row * columns + column
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values) / columns
    centred = tl.where(inside, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred) / columns + eps)
    result = centred * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        values += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + place, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(shifted + place, values.to(shifted.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)


@triton.jit
def _norm_rows_backward(
    grad_normed, grad_shifted, x, weight, means, scales, grad_x, sums, rows, columns,
    block: tl.constexpr,
):  # fmt: skip
    """Of every so many rows, as there are programs: the gradient by ``x``, and a part of the
    gradients by weight, bias and shift, (3, C) a program in fp32.
    """
    column = tl.arange(0, block)
    inside = column < columns
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    by_weight = tl.zeros((block,), tl.float32)
    by_bias = tl.zeros((block,), tl.float32)
    by_shift = tl.zeros((block,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = row * columns.to(tl.int64) + column
        grad = tl.load(grad_normed + place, mask=inside, other=0.0).to(tl.float32)
        along = tl.load(grad_shifted + place, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        unit = tl.where(inside, (values - tl.load(means + row)) * scale, 0.0)
        scaled = grad * factor
        inner = tl.sum(scaled * unit) / columns
        result = (scaled - tl.sum(scaled) / columns - unit * inner) * scale + along
        tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), mask=inside)
        by_weight += grad * unit
        by_bias += grad
        by_shift += along
    part = sums + tl.program_id(0) * 3 * columns + column
    tl.store(part, by_weight, mask=inside)
    tl.store(part + columns, by_bias, mask=inside)
    tl.store(part + 2 * columns, by_shift, mask=inside)


@triton.jit
def _tile(rows, width, tile_rows: tl.constexpr, tile_columns: tl.constexpr):
    """A program's tile, by groups of eight tiles of rows, which share columns in the cache."""
    program = tl.program_id(0)
    below, across = tl.cdiv(rows, tile_rows), tl.cdiv(width, tile_columns)
    group = program // (8 * across)
    height = min(below - group * 8, 8)
    within = program % (8 * across)
    return group * 8 + within % height, within // height


@triton.jit
def _product(
    a, b, m, n, rows, width, depth, b_by_depth, b_by_width,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
):  # fmt: skip
    """Of a tile, in fp32: a (n, K) with contiguous rows, b (K, N) of any strides."""
    # Rows and columns beyond the end are those from the beginning again, which nothing stores.
    row = (m * tile_rows + tl.arange(0, tile_rows)).to(tl.int64) % rows
    column = (n * tile_columns + tl.arange(0, tile_columns)) % width
    k = tl.arange(0, tile_depth)
    left = a + row[:, None] * depth + k[None, :]
    right = b + k[:, None] * b_by_depth + column[None, :] * b_by_width
    total = tl.zeros((tile_rows, tile_columns), tl.float32)
    for start in range(0, depth, tile_depth):
        x = tl.load(left, mask=k[None, :] < depth - start, other=0.0)
        y = tl.load(right, mask=k[:, None] < depth - start, other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += tile_depth
        right += tile_depth * b_by_depth
    return total


@triton.jit
def _gate(x, tanh: tl.constexpr):
    """What GELU multiplies ``x`` by, and the derivative of that."""
    if tanh:  # (1 + tanh(u)) / 2 is the logistic function of 2 u
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        gate = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return gate, slope


@_tuned
@triton.jit
def _product_gelu(
    x, weight, bias, before, after, rows, width, depth, tanh: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
):  # fmt: skip
    """A tile of ``x @ weight.T + bias``, and of its GELU. ``bias`` may be None."""
    m, n = _tile(rows, width, tile_rows, tile_columns)
    total = _product(
        x, weight, m, n, rows, width, depth, 1, depth, tile_rows, tile_columns, tile_depth
    )  # fmt: skip
    row = (m * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    column = n * tile_columns + tl.arange(0, tile_columns)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    place = row[:, None] * width + column[None, :]
    if bias is not None:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    rounded = total.to(before.dtype.element_ty)
    tl.store(before + place, rounded, mask=inside)
    total = rounded.to(tl.float32)
    gate, _ = _gate(total, tanh)
    tl.store(after + place, (total * gate).to(after.dtype.element_ty), mask=inside)


@_tuned
@triton.jit
def _product_gelu_backward(
    grad, weight, before, grad_before, sums, rows, width, depth, tanh: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
):  # fmt: skip
    """A tile of ``grad @ weight`` times GELU's derivative at ``before``, and the sums of its
    columns, (N,) for each tile of rows in fp32.
    """
    m, n = _tile(rows, width, tile_rows, tile_columns)
    total = _product(
        grad, weight, m, n, rows, width, depth, width, 1, tile_rows, tile_columns, tile_depth
    )  # fmt: skip
    row = (m * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    column = n * tile_columns + tl.arange(0, tile_columns)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    place = row[:, None] * width + column[None, :]
    value = tl.load(before + place, mask=inside, other=0.0).to(tl.float32)
    gate, slope = _gate(value, tanh)
    rounded = (total * (gate + value * slope)).to(grad_before.dtype.element_ty)
    tl.store(grad_before + place, rounded, mask=inside)
    summed = tl.sum(tl.where(inside, rounded.to(tl.float32), 0.0), axis=0)
    tl.store(sums + m.to(tl.int64) * width + column, summed, mask=column < width)


def launch_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``block_operators.norm_and_shift`` does."""
    x = x.contiguous()
    normed, shifted = torch.empty_like(x), torch.empty_like(x)
    means, scales = (x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    _norm_rows[(means.numel(),)](
        x, weight, bias, shift, normed, shifted, means, scales, columns, eps,
        block=block, num_warps=_warps(block),
    )  # fmt: skip
    return normed, shifted, means, scales


def launch_norm_backward(
    grad_normed: Tensor,
    grad_shifted: Tensor,
    x: Tensor,
    weight: Tensor,
    means: Tensor,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:
    """What ``block_operators.norm_and_shift_backward`` does."""
    grad_normed, grad_shifted, x = (t.contiguous() for t in (grad_normed, grad_shifted, x))
    grad_x, columns, rows = torch.empty_like(x), x.shape[-1], means.numel()
    parts = parts_of_rows(rows)
    sums = x.new_empty(parts, 3, columns, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    _norm_rows_backward[(parts,)](
        grad_normed, grad_shifted, x, weight, means, scales, grad_x, sums, rows, columns,
        block=block, num_warps=_warps(block),
    )  # fmt: skip
    return grad_x, sums


def _warps(columns: int) -> int:
    """Of a program that holds a row: eight numbers a thread."""
    return min(max(columns // 256, 1), 16)


def launch_product_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """What ``block_operators.product_gelu`` does."""
    x, weight = x.contiguous(), weight.contiguous()
    width, depth = weight.shape
    before, after = (x.new_empty(*x.shape[:-1], width) for _ in range(2))
    rows = x.numel() // depth
    _run(
        _product_gelu, rows, width,
        x, weight, bias, before, after, rows, width, depth, tanh=tanh,
    )  # fmt: skip
    return before, after


def launch_product_gelu_backward(
    grad: Tensor, weight: Tensor, before: Tensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    """What ``block_operators.product_gelu_backward`` does."""
    grad, weight, before = grad.contiguous(), weight.contiguous(), before.contiguous()
    depth, width = weight.shape
    rows = grad.numel() // depth
    grad_before = torch.empty_like(before)
    sums = grad.new_empty(triton.cdiv(rows, TILE_ROWS), width, dtype=torch.float32)
    _run(
        _product_gelu_backward, rows, width,
        grad, weight, before, grad_before, sums, rows, width, depth, tanh=tanh,
    )  # fmt: skip
    return grad_before, sums


def _run(kernel: Any, rows: int, width: int, *arguments: Any, **options: Any) -> None:
    """A program for each tile. What must be the same to the bit in every run has always one tile:
    the fastest may be another in the next one.
    """

    def programs(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, tile["tile_rows"]) * triton.cdiv(width, tile["tile_columns"]),)

    if torch.are_deterministic_algorithms_enabled() or triton.knobs.runtime.interpret:
        kernel.fn[programs](*arguments, **options, **_TILES[0].all_kwargs())
    else:
        kernel[programs](*arguments, **options)
