"""The transformer block and the stack of them that every model is made of.

Shapes: B batch, T tokens, C hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megaegpt.config import ModelConfig
from megaegpt.model.attention import build_attention
from megaegpt.model.attention.context import AttentionContext
from megaegpt.model.fused_block import add_fused, can_be_fused, should_be_fused
from megaegpt.model.mlp import build_mlp
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import LayerNorm, RMSNorm
from megaegpt.parallel.sequence import SequenceShards, dropout

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
    "megaegpt": ("adapted_products",),
}
"""Matrix products and attention, by their names in ``torch.ops``."""

_SAVED_BY_SELECTIVE = {
    getattr(namespace, name).default
    for namespace, names in ((getattr(torch.ops, n), names) for n, names in _EXPENSIVE.items())
    for name in names
    if hasattr(namespace, name)  # private ones come and go, and not every build has oneDNN
}


def block_norm(config: ModelConfig, grid: ProcessGrid) -> LayerNorm | RMSNorm:
    """The norm of a block's parts and of the stack's output."""
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, grid, eps=config.layer_norm_eps)
    return LayerNorm(config.hidden_size, grid, bias=config.bias, eps=config.layer_norm_eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or norms of what is added."""

    def __init__(self, config: ModelConfig, layer: int, grid: ProcessGrid) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm_first = config.norm_placement == "pre"
        self.attention_norm = block_norm(config, grid)
        self.attention = build_attention(config, layer, grid)
        self.mlp_norm = block_norm(config, grid)
        self.mlp = build_mlp(config, grid)

    def forward(self, x: Tensor, context: AttentionContext, selective: bool = False) -> Tensor:
        """(B, T, C) -> (B, T, C), or this rank's rows (n, C) -> (n, C); with ``selective``, cheap
        results are computed again in the backward pass.

        The block checkpoints by itself, so that a compiled block holds the checkpoint: from
        outside, the policy sees no operator of compiled code, and every product would run again.
        """
        if selective:
            policy = functools.partial(create_selective_checkpoint_contexts, _keep)
            return checkpoint(self._add, x, context, use_reentrant=False, context_fn=policy)
        return self._add(x, context)

    def _add(self, x: Tensor, context: AttentionContext) -> Tensor:
        shards = context.shards
        if self.norm_first:
            attended = self.attention(self.attention_norm(x, shards), context)
            x = x + dropout(attended, self.dropout, self.training, shards)
            y = self.mlp(self.mlp_norm(x, shards), shards)
        else:
            attended = self.attention_norm(self.attention(x, context), shards)
            x = x + dropout(attended, self.dropout, self.training, shards)
            y = self.mlp_norm(self.mlp(x, shards), shards)
        return x + dropout(y, self.dropout, self.training, shards)


class BlockStack(nn.Module):
    """``num_layers`` blocks and the final norm, with optional activation checkpointing and sequence
    parallelism.
    """

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        self.grid = grid
        self.recompute = "none"
        self.sequence_parallel = False
        self.fused: bool | None = None
        """Whether blocks are computed by the operators of ``parallel.block_operators``, if they
        can be; None: on CUDA, where their kernels work."""
        self._can_be_fused = can_be_fused(config, grid)
        self.blocks = nn.ModuleList(Block(config, i, grid) for i in range(config.num_layers))
        self.norm: LayerNorm | RMSNorm | None = block_norm(config, grid)

    def shards(self, batch: int, length: int) -> SequenceShards | None:
        """Return which rows of (B, T) tokens a rank has of a pass without a cache; None: all."""
        if self.grid.tp_group is None or not self.sequence_parallel:
            return None
        return SequenceShards(self.grid, batch, length, keeps_rows=self.recompute == "none")

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C), or with ``context.shards`` this rank's rows (n, C), -> (B, T, C) after the
        final norm, on every rank
        """
        selective = self.training and self.recompute == "selective"
        for block in cast(Iterable[Block], self.blocks):
            run = functools.partial(block, selective=selective)
            if self._can_be_fused and not selective and should_be_fused(block, x, self.fused):
                run = functools.partial(add_fused, block)  # of which nothing is left to compile
            if self.training and self.recompute == "full":
                x = checkpoint(run, x, context, use_reentrant=False)
            else:
                x = run(x, context)
        if self.norm is not None:
            x = self.norm(x, context.shards)
        return x if context.shards is None else context.shards.whole(x)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block, with ``options`` for :func:`torch.compile`; equal blocks share code.

        Widths, windows, training and evaluation take a version each, and what exceeds torch's limit
        of versions would run uncompiled: it is raised.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in self.blocks:
            block.compile(**options)


def _keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the expensive results (matrix products, attention), recompute the cheap ones."""
    saved = op in _SAVED_BY_SELECTIVE
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
