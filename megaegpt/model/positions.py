"""Positions that are added to a token's embedding: learned ones and sinusoids.

Shapes: B batch, T tokens, C hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import Embedding
from megaegpt.parallel.sequence import SequenceShards


def sinusoids(positions: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Vaswani et al. (arXiv 1706.03762, section 3.5): sines in even columns, cosines in odd ones.

    (...) positions -> (..., C)
    """
    rates = torch.exp(
        torch.arange(0, hidden_size, 2, device=positions.device, dtype=torch.float64)
        * (-math.log(10000.0) / hidden_size)
    )
    angles = positions.to(torch.float64).unsqueeze(-1) * rates  # (..., ceil(C / 2))
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., C or C + 1)
    return table[..., :hidden_size].to(dtype)


class AddedPositions(nn.Module):
    """The vector added to a token's embedding: a learned row, a sinusoid, or nothing."""

    def __init__(self, config: ModelConfig, rows: int, grid: ProcessGrid, *, std: float) -> None:
        """``rows`` positions are known to a learned table, whose initial values have ``std``."""
        super().__init__()
        self.kind = config.positions
        self.hidden_size = config.hidden_size
        self.table = (
            Embedding(rows, config.hidden_size, grid, std)
            if config.positions == "learned"
            else None
        )

    def forward(self, x: Tensor, positions: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """x (..., T, C), positions broadcastable to (..., T) -> x with its positions added; with
        ``shards`` x (n, C), positions (n,) are this rank's rows.
        """
        if self.table is not None:
            return x + self.table(positions, shards)
        if self.kind == "sinusoidal":
            return x + sinusoids(positions, self.hidden_size, x.dtype)
        return x
