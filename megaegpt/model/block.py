"""The pre-LayerNorm transformer block and the stack of them that every model is made of.

Shapes: B batch, T tokens, C hidden.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megaegpt.config import ModelConfig
from megaegpt.model.attention import build_attention
from megaegpt.model.attention.context import AttentionContext
from megaegpt.parallel.collectives import copy_to_tp
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import ColumnParallelLinear, LayerNorm, RowParallelLinear

_APPROXIMATION = {"gelu_tanh": "tanh", "gelu": "none"}

_EXPENSIVE = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    "mkldnn": ("_linear_pointwise",),
}
"""Matrix products and attention, by their names in ``torch.ops``."""

_SAVED_BY_SELECTIVE = {
    getattr(namespace, name).default
    for namespace, names in ((getattr(torch.ops, n), names) for n, names in _EXPENSIVE.items())
    for name in names
    if hasattr(namespace, name)  # private ones come and go, and not every build has oneDNN
}


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

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        return self.down(F.gelu(self.up(copy_to_tp(x, self.grid)), approximate=self.approximate))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, grid: ProcessGrid) -> None:
        super().__init__()
        self.dropout = config.dropout
        norm = functools.partial(
            LayerNorm, config.hidden_size, grid, bias=config.bias, eps=config.layer_norm_eps
        )
        self.attention_norm = norm()
        self.attention = build_attention(config, layer, grid)
        self.mlp_norm = norm()
        self.mlp = MLP(config, grid, out_std=config.residual_std)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        attended = self.attention(self.attention_norm(x), context)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class BlockStack(nn.Module):
    """``num_layers`` blocks and the final LayerNorm, with optional activation checkpointing."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        self.recompute = "none"
        self.blocks = nn.ModuleList(Block(config, i, grid) for i in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, grid, bias=config.bias, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C), after the final LayerNorm"""
        for block in self.blocks:
            if self.training and self.recompute != "none":
                x = checkpoint(block, x, context, use_reentrant=False, **self._policy())
            else:
                x = block(x, context)
        return self.norm(x)

    def _policy(self) -> dict[str, Any]:
        if self.recompute == "full":
            return {}
        return {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep)}


def _keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the expensive results (matrix products, attention), recompute the cheap ones."""
    saved = op in _SAVED_BY_SELECTIVE
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
