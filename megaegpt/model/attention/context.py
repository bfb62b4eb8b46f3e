"""Who attends to whom. An attention kind projects; a context decides what the queries see.

The split keeps kinds of attention (grouped-query, latent) apart from layouts of tokens (a causal
sequence, EGPT's chunks beside their memory), so every kind works in every layout.

Shapes: B batch, T tokens, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megaegpt.model.attention.causal import OncePerPass, Segments, causal_attention
from megaegpt.model.attention.layer import AttentionLayer
from megaegpt.model.rotary import RotaryTable
from megaegpt.parallel.context_shards import ContextShards
from megaegpt.parallel.sequence import SequenceShards


class AttentionContext(Protocol):
    """Knowledge about the tokens that all layers of one forward pass share."""

    rotary: RotaryTable | None
    """Rotations of this pass's tokens; None unless positions are rotary."""
    absorbed: bool
    """Keys and values outlive the pass: latent attention gives its latents themselves, and absorbs
    the projections of keys and values into queries and outputs."""
    shards: SequenceShards | None
    """Of the tokens outside of attention and MLP; None: every rank has all of them, as while
    decoding."""
    context_shards: ContextShards | None
    """Of the sequences; None: every rank has all of their tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """q (B, H, T, D), k and v (B, K, T, D) of the same tokens, or with ``context_shards`` of
        those of all ranks -> (B, H, T, D).

        Scores are scaled by 1 / sqrt(D).
        """
        ...


class CausalContext:
    """An ordinary sequence: each token sees itself and its past.

    Args:
        rotary: rotations of the tokens.
        segments: (B, T) texts and padding within a row, see :mod:`megaegpt.model.segments`.
        shards: of the tokens.
    """

    absorbed = False
    context_shards: ContextShards | None = None

    def __init__(
        self,
        rotary: RotaryTable | None = None,
        segments: Tensor | None = None,
        shards: SequenceShards | None = None,
    ) -> None:
        self.rotary, self.shards = rotary, shards
        self._masks = OncePerPass()
        self._segments = None if segments is None else Segments(segments, segments)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        return causal_attention(
            q,
            k,
            v,
            window=layer.window,
            dropout=layer.dropout,
            segments=self._segments,
            masks=self._masks,
        )
