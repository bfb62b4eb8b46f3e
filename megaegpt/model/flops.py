"""Operation counts for MFU, by the convention of PaLM (arXiv 2204.02311, appendix B): a
multiply-add is two operations, the backward pass costs twice the forward, causal attention counts
in full.
"""

from __future__ import annotations

from torch import nn

from megaegpt.config import ModelConfig
from megaegpt.model.attention.layer import layer_window
from megaegpt.parallel.layers import count_linear_weights


def matmul_flops(module: nn.Module) -> int:
    """Forward operations of a module's linear layers for one token."""
    return 2 * count_linear_weights(module)


def attention_flops(config: ModelConfig, visible: int) -> int:
    """Forward operations of scores and weighted sums for one token that sees ``visible`` keys."""
    keys = 0
    for layer in range(config.num_layers):
        window = layer_window(config, layer)
        keys += visible if window is None else min(window, visible)
    rotary_part = (config.rope_head_dim or 0) if config.attention == "latent" else 0
    return 2 * keys * config.num_heads * (2 * config.head_size + rotary_part)
