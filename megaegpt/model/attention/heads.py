"""What the attention kinds share about their heads.

Shapes: B batch, T tokens, H this rank's heads, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import new_parameter
from megaegpt.parallel.rng import sharded_rng


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(2)


def memory_gate(config: ModelConfig, grid: ProcessGrid) -> nn.Parameter | None:
    """EGPT's gate per head, (H,), on what is read from earlier chunks, if the model has one."""
    if config.kind != "egpt" or not config.egpt.memory_gate:
        return None
    return new_parameter((config.num_heads,), grid, tp_dim=0)


def attention_rng(grid: ProcessGrid, dropout: float) -> AbstractContextManager[None]:
    """Attention weights are cut over TP by heads: every rank drops its own. Without dropout nothing
    is drawn, and a compiled block stays one graph.
    """
    return sharded_rng(grid) if dropout else nullcontext()
