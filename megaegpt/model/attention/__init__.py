"""Attention kinds, chosen by ``config.attention``."""

from torch import nn

from megaegpt.config import ModelConfig
from megaegpt.model.attention.grouped_query import GroupedQueryAttention
from megaegpt.model.attention.latent import LatentAttention
from megaegpt.parallel.grid import ProcessGrid

_KINDS: dict[str, type[GroupedQueryAttention] | type[LatentAttention]] = {
    "grouped_query": GroupedQueryAttention,
    "latent": LatentAttention,
}


def build_attention(config: ModelConfig, layer: int, grid: ProcessGrid) -> nn.Module:
    """The attention module of one layer: ``forward(x (B, T, C), context) -> (B, T, C)``."""
    return _KINDS[config.attention](config, layer, grid)
