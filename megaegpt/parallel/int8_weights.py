"""Weights as 8-bit integers with a scale for each row, for inference on a CPU.

A matrix takes a quarter of its memory in fp32, and with few rows a product takes as long as reading
its weight. Only weights are rounded so; with few rows the input and the result are rounded to bf16
besides, since torch's product with int8 weights is slower in fp32 than one with fp32 weights.

Shapes: (..., I) rows, (O, I) weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaegpt.parallel.grid import ProcessGrid

MOST_ROWS = 16
"""Rows up to which torch's product with int8 weights is faster than one with parts in fp32."""

_LARGEST = 127
_MULTIPLE = 32
"""Torch's product reads behind rows whose length is no multiple of a vector's, unasked."""
_PART = 1 << 20
"""Numbers of a weight that are in the rows' type at once, in products with many rows."""


class Int8Weight(NamedTuple):
    """A weight (O, I) that is ``values * scales.unsqueeze(1)``."""

    values: Tensor
    """(O, I) int8, from -127 to 127"""
    scales: Tensor
    """(O,) bf16: torch's product takes no others, and by them it multiplies before it rounds"""

    def product(
        self, x: Tensor, bias: Tensor | None, dense: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """``x @ weight.T + bias``, (..., I) -> (..., O), without gradients.

        Args:
            dense: the product with a weight in the type of ``x``.
        """
        rows = x.reshape(-1, x.shape[-1])
        if 0 < len(rows) <= MOST_ROWS and x.shape[-1] % _MULTIPLE == 0:
            rows = rows.bfloat16().contiguous()
            y = torch.ops.aten._weight_int8pack_mm(rows, self.values, self.scales)
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
        else:
            y = torch.cat([dense(x, part) for part in self._parts(x.dtype)], dim=-1)
        return y if bias is None else y + bias

    def embedding(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows at some indices: (...) -> (..., I)"""
        scales = self.scales[indices].to(dtype)
        return F.embedding(indices, self.values).to(dtype) * scales.unsqueeze(-1)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) as it is multiplied by."""
        return self.values.to(dtype) * self.scales.to(dtype).unsqueeze(1)

    def _parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        size = max(_PART // self.values.shape[1], 1)
        for values, scales in zip(self.values.split(size), self.scales.split(size), strict=True):
            yield Int8Weight(values, scales).whole(dtype)


def int8_weight(weight: Tensor, grid: ProcessGrid | None = None) -> Int8Weight:
    """Round a weight (O, I) to 255 steps a row, each of the row's largest number over 127 in bf16.

    Args:
        grid: of ranks that have other columns of the same rows: all get the same scales.
    """
    largest = weight.abs().amax(1)
    if grid is not None and grid.tp_group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=grid.tp_group)
    # In bf16 a scale may be smaller, and leaves the largest number within 127.5 steps still.
    scales = torch.where(largest == 0, 1.0, largest / _LARGEST).bfloat16()
    steps = weight / scales.to(weight.dtype).unsqueeze(1)
    return Int8Weight(steps.round_().to(torch.int8), scales)
