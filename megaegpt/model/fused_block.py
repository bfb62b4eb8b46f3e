"""Blocks of GPT-2's kind by the operators of ``parallel.block_operators``.

Shapes: B batch, T tokens, C hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.model.attention.context import AttentionContext
from megaegpt.model.attention.grouped_query import GroupedQueryAttention
from megaegpt.parallel.block_operators import (
    add_gelu_mlp_,
    add_product_,
    kernel_problem,
    normed_and_shifted,
    project,
)
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.partitions import is_partitioned

if TYPE_CHECKING:
    from megaegpt.model.block import Block


def can_be_fused(config: ModelConfig, grid: ProcessGrid) -> bool:
    """Whether the operators compute all that a model's blocks have beside their attention.

    What other blocks have (rotations, gates, norms of heads) the compiler fuses well by itself, and
    tensor-parallel ranks have sums to wait for.
    """
    is_gpt2s = (
        config.norm == "layer_norm" and config.norm_placement == "pre" and config.mlp == "gelu"
    )
    is_plain = config.positions != "rotary" and config.qk_norm == "none"
    is_whole = config.attention == "grouped_query" and grid.tp_group is None
    return is_gpt2s and is_plain and is_whole


def should_be_fused(block: Block, x: Tensor, wanted: bool | None) -> bool:
    """Whether a block that can be is to be computed so, for (B, T, C): in training, without dropout
    and without adapters.

    Args:
        wanted: None: on CUDA in half precision, where the kernels work.
    """
    if not torch.is_grad_enabled() or (block.training and block.dropout):
        return False
    layers = _layers(block)
    if any(layer.lora is not None for layer in layers):
        return False
    if is_partitioned(layers[0].weight):  # ZeRO stage 3 gathers for calls of layers
        return False
    if wanted is not None:
        return wanted
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and is_half and kernel_problem("cuda") is None


def add_fused(block: Block, x: Tensor, context: AttentionContext) -> Tensor:
    """What the block does, (B, T, C) -> (B, T, C)"""
    *projections, output, up, down = _layers(block)
    norm = block.attention_norm
    y, x = normed_and_shifted(x, *_parameters(norm), output.bias, norm.eps)
    projected = project(y, *(_parameters(layer) for layer in projections))
    attention = cast(GroupedQueryAttention, block.attention)
    x = add_product_(x, attention.attend(projected, context), output.weight)
    norm = block.mlp_norm
    y, x = normed_and_shifted(x, *_parameters(norm), down.bias, norm.eps)
    is_tanh = block.mlp.approximate == "tanh"
    return add_gelu_mlp_(x, y, *_parameters(up), down.weight, tanh=is_tanh)


def _layers(block: Block) -> tuple[Any, ...]:
    attention, mlp = block.attention, block.mlp
    projections = (attention.query, attention.key, attention.value)
    return (*projections, attention.output, mlp.up, mlp.down)


def _parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight, layer.bias
