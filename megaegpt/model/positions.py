"""How a token knows where it is: tables added to the input, or rotations of queries and keys.

Shapes: B batch, T tokens, C hidden, H heads, D rotated part of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import Embedding


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

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (..., T, C), positions broadcastable to (..., T) -> x with its positions added"""
        if self.table is not None:
            return x + self.table(positions)
        if self.kind == "sinusoidal":
            return x + sinusoids(positions, self.hidden_size, x.dtype)
        return x


class RotaryTable:
    """Cosines and sines of rotary positions (Su et al., arXiv 2104.09864) for one set of tokens."""

    def __init__(self, positions: Tensor, dim: int, base: float, dtype: torch.dtype) -> None:
        """Make the table, which all layers read.

        Args:
            positions: (T,) or (B, T).
            dim: columns rotated, in pairs (i, i + dim/2).
            base: of the frequencies.
            dtype: of what is rotated; the table, and what is computed, is in at least fp32.
        """
        rates = base ** (
            -torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
        )
        angles = positions.to(torch.float64).unsqueeze(-1) * rates  # (..., T, D / 2)
        precise = torch.promote_types(dtype, torch.float32)
        self._cos, self._sin = angles.cos().to(precise), angles.sin().to(precise)
        if positions.dim() == 2:  # a heads' dimension to broadcast over: (B, 1, T, D / 2)
            self._cos, self._sin = self._cos.unsqueeze(1), self._sin.unsqueeze(1)

    def rotate(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> the same, rotated."""
        cos, sin = self._cos, self._sin
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(rotated, dim=-1).to(x.dtype)


def rotary_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> RotaryTable | None:
    """The table all layers share for tokens at ``positions``, whose states are of ``dtype``; None
    unless positions are rotary.
    """
    if config.positions != "rotary":
        return None
    dim = config.rope_head_dim if config.attention == "latent" else config.head_size
    assert dim is not None  # config validation: latent + rotary needs rope_head_dim
    return RotaryTable(positions, dim, config.rope_base, dtype)
