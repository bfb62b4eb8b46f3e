"""The MLPs of a block: GPT-2's, and gated ones.

Shapes: C hidden.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megaegpt.config import ModelConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import ColumnParallelLinear, RowParallelLinear, column_parallel
from megaegpt.parallel.sequence import SequenceShards

_APPROXIMATION = {"gelu_tanh": "tanh", "gelu": "none"}


class MLP(nn.Module):
    """GPT-2's MLP: up by column, GELU, down by row."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid, *, out_std: float) -> None:
        super().__init__()
        self.grid = grid
        self.approximate = _APPROXIMATION[config.activation]
        hidden, ffn, std, bias = (
            config.hidden_size,
            config.ffn_size,
            config.init_std,
            config.bias,
        )
        self.up = ColumnParallelLinear(hidden, ffn, grid, bias=bias, std=std)
        self.down = RowParallelLinear(ffn, hidden, grid, bias=bias, std=out_std)

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(..., C) -> (..., C), or this rank's rows (n, C) -> (n, C)"""
        (up,) = column_parallel(x, [self.up], self.grid, shards)
        return self.down(F.gelu(up, approximate=self.approximate), shards)


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer, arXiv 2002.05202): SwiGLU, or GEGLU."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid, *, out_std: float) -> None:
        super().__init__()
        self.grid = grid
        self.approximate = None if config.mlp == "swiglu" else _APPROXIMATION[config.activation]
        hidden, ffn, std, bias = (
            config.hidden_size,
            config.ffn_size,
            config.init_std,
            config.bias,
        )
        self.gate, self.up = (
            ColumnParallelLinear(hidden, ffn, grid, bias=bias, std=std) for _ in range(2)
        )
        self.down = RowParallelLinear(ffn, hidden, grid, bias=bias, std=out_std)

    def forward(self, x: Tensor, shards: SequenceShards | None = None) -> Tensor:
        """(..., C) -> (..., C), or this rank's rows (n, C) -> (n, C)"""
        gate, up = column_parallel(x, [self.gate, self.up], self.grid, shards)
        return self.down(self._activate(gate) * up, shards)

    def _activate(self, gate: Tensor) -> Tensor:
        if self.approximate is None:
            return F.silu(gate)
        return F.gelu(gate, approximate=self.approximate)


def build_mlp(config: ModelConfig, grid: ProcessGrid) -> MLP | GatedMLP:
    """The MLP of a block."""
    kind = GatedMLP if config.has_gated_mlp else MLP
    return kind(config, grid, out_std=config.residual_std)
