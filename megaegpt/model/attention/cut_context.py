"""Attention of a causal sequence whose tokens are cut over context-parallel ranks.

Shapes: B batch, T tokens of the sequence, n tokens of a rank, T' tokens of all ranks with padding,
H heads, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaegpt.labels import PADDING
from megaegpt.model.attention.causal import OncePerPass, Segments, causal_attention
from megaegpt.model.attention.layer import AttentionLayer
from megaegpt.model.rotary import RotaryTable
from megaegpt.parallel.context_shards import ContextShards
from megaegpt.parallel.sequence import SequenceShards


class CutContext:
    """An ordinary sequence, of which this rank has some tokens: each sees itself and its past,
    wherever that is.

    Args:
        cut: which tokens each rank has.
        rotary: rotations of this rank's tokens.
        segments: (B, T) of all tokens, see :mod:`megaegpt.model.segments`.
        shards: of this rank's tokens.
    """

    absorbed = False

    def __init__(
        self,
        cut: ContextShards,
        rotary: RotaryTable | None = None,
        segments: Tensor | None = None,
        shards: SequenceShards | None = None,
    ) -> None:
        self.rotary, self.shards = rotary, shards
        self.context_shards: ContextShards | None = cut
        self._cut = cut
        self._segments = None if segments is None else cut.padded(segments, PADDING)
        self._masks = OncePerPass(), OncePerPass()  # of the pieces, or of all tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """As of every context; keys and values may be those of all tokens already, (B, K, T', D):
        latent attention makes them of the latents that it gathers.

        Heads that divide over the ranks are exchanged for tokens; else keys and values, of which
        there are fewer heads, are gathered.
        """
        if k.shape[2] > q.shape[2]:
            return self._attend_to_all(q, k, v, layer)
        if self._cut.divides(q.shape[1], k.shape[1]):
            return self._attend_by_heads(q, k, v, layer)
        k, v = self._cut.gather(torch.cat([k, v], dim=1)).chunk(2, dim=1)
        return self._attend_to_all(q, k, v, layer)

    def _attend_by_heads(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """All three in one message, which each rank is sent its heads of; a key head to all ranks
        whose queries read it.
        """
        ranks = self._cut.grid.cp_size
        if k.shape[1] < ranks:
            k, v = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (k, v))
        by_rank = [x.unflatten(1, (ranks, -1)) for x in (q, k, v)]
        heads = [x.shape[2] for x in by_rank]
        exchanged = self._cut.to_heads(torch.cat(by_rank, dim=2).flatten(1, 2))
        q, k, v = exchanged.split(heads, dim=1)  # (B, heads, T', D)
        segments = self._segments
        y = causal_attention(
            q,
            k,
            v,
            window=layer.window,
            dropout=layer.dropout,
            segments=None if segments is None else Segments(segments, segments),
            masks=self._masks[0],
        )
        return self._cut.to_tokens(y)

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """Each of this rank's two pieces sees the tokens up to its end."""
        parts, piece = [], self._cut.piece
        for number, start in enumerate(self._cut.starts):
            end, segments = start + piece, self._segments
            of_piece = None
            if segments is not None:
                of_piece = Segments(segments[:, start:end], segments[:, :end])
            y = causal_attention(
                q[:, :, number * piece : (number + 1) * piece],
                k[:, :, :end],
                v[:, :, :end],
                window=layer.window,
                dropout=layer.dropout,
                segments=of_piece,
                masks=self._masks[number],
            )
            parts.append(y)
        return torch.cat(parts, dim=2)
