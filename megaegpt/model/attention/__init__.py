"""Attention kinds, chosen by ``config.attention``."""

from torch import nn

from megaegpt.config import ModelConfig
from megaegpt.model.attention.grouped_query import GroupedQueryAttention
from megaegpt.parallel.grid import ProcessGrid

_KINDS = {"grouped_query": GroupedQueryAttention}


def build_attention(config: ModelConfig, layer: int, grid: ProcessGrid) -> nn.Module:
    """The attention module of one layer: ``forward(x (B, T, C), context) -> (B, T, C)``."""
    return _KINDS[config.attention](config, layer, grid)
