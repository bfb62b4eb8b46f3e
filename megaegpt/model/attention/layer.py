"""The description of a layer for an attention context, and the handling of heads that all kinds
share.

Shapes: B batch, T tokens, H this rank's heads, D head dim.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.rng import sharded_rng


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention, as far as a context has to know it."""

    index: int
    """Its number in the model, from 0: where a context keeps something for each layer."""
    window: int | None
    """Sliding window: a token sees itself and the ``window - 1`` tokens before it; None: all."""
    dropout: float
    """Probability that an attention weight is dropped; 0 outside of training."""

    @staticmethod
    def both(config: ModelConfig, index: int) -> tuple[AttentionLayer, AttentionLayer]:
        """The layer as it is trained, and as it is evaluated.

        A module makes them once: a compiled block in which one is made reads ``index``, and then no
        other block shares its code.
        """
        trained = AttentionLayer(index, layer_window(config, index), config.dropout)
        return trained, dataclasses.replace(trained, dropout=0.0)


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """The sliding window of a layer; every ``window_every``-th layer is global."""
    if config.window_every and (layer + 1) % config.window_every == 0:
        return None
    return config.window


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(2)


def attention_rng(grid: ProcessGrid, dropout: float) -> AbstractContextManager[None]:
    """Attention weights are cut over TP by heads: every rank drops its own. Without dropout nothing
    is drawn, and a compiled block stays one graph.
    """
    return sharded_rng(grid) if dropout else nullcontext()
