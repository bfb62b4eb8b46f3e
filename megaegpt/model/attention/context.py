"""Who attends to whom. An attention kind projects; a context decides what the queries see.

The split keeps kinds of attention (grouped-query, latent) apart from layouts of tokens (a causal
sequence, EGPT's chunks beside their memory), so every kind works in every layout.

Shapes: B batch, T tokens, S keys, H heads, K kv heads, G = H / K, D head dim, Dv value dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.model.positions import RotaryTable


class AttentionContext(Protocol):
    """What the layers of one forward pass share about the tokens they are given."""

    rotary: RotaryTable | None
    """Rotations of this pass's tokens; None unless positions are rotary."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        window: int | None,
        dropout: float,
        gate: Tensor | None,
    ) -> Tensor:
        """q (B, H, T, D), k (B, K, T, D), v (B, K, T, Dv) of the same tokens -> (B, H, T, Dv)."""
        ...


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """The sliding window of a layer; every ``window_every``-th layer is global."""
    if config.window_every and (layer + 1) % config.window_every == 0:
        return None
    return config.window


def band_mask(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """True where the key at position ``columns`` is visible from ``rows``: the past, in the window.

    (..., T) and (..., S) absolute positions -> (..., T, S)
    """
    distance = rows.unsqueeze(-1) - columns.unsqueeze(-2)
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


class CausalContext:
    """An ordinary sequence: each token sees itself and its past."""

    def __init__(self, rotary: RotaryTable | None = None) -> None:
        self.rotary = rotary

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        window: int | None,
        dropout: float,
        gate: Tensor | None,
    ) -> Tensor:
        """See :class:`AttentionContext`."""
        length = q.shape[2]
        grouped = q.shape[1] != k.shape[1]
        if window is None or window >= length:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped
            )
        positions = torch.arange(length, device=q.device)
        mask = band_mask(positions, positions, window)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=grouped)
