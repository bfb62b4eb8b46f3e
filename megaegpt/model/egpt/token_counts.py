"""Which tokens the earlier chunks were made of, mixed into the prediction.

The features of a chunk say what it is about; which words it used cannot be read out of a few
vectors, and that is what predicts best which words come again. So a chunk's token counts are kept
beside its features, S integers whatever the width, and a token is predicted as

    p(y) = (1 - g) p_head(y) + g sum_c a_c n_c(y) / S

a unigram cache (Kuhn and De Mori, IEEE PAMI 12, 1990) of which the hidden state chooses the chunks
by their features, and how much of it: the gate of a pointer-sentinel mixture (Merity et al., arXiv
1609.07843).

Shapes: B batch, T tokens, M earlier chunks, S chunk size, P features a chunk, C hidden, D query
width, V padded vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import new_parameter

_GATE_BIAS = -2.2
"""The gate's bias in a new model: it opens a tenth, which is near the best constant share."""


def count_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """(B, M, S) ids, negative where there is none -> (B, M, V) fp32, how often each is there."""
    counts = tokens.new_zeros((*tokens.shape[:2], vocab_size), dtype=torch.float32)
    return counts.scatter_add_(2, tokens.clamp(min=0), (tokens >= 0).float())


class CountMixture(NamedTuple):
    """The distribution that is mixed with the head's at each token."""

    log_keep: Tensor
    """(B, T): log of the head's share, ``log(1 - g)``."""
    shares: Tensor
    """(B, T, M): ``g a_c / S``."""
    counts: Tensor
    """(B, M, V): ``n_c``."""

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) ids, negative where there is none -> (B, T) each: the log of the head's share, and
        what the counts add to their probability.
        """
        ids = targets.clamp(min=0).unsqueeze(1).expand(-1, self.shares.shape[2], -1)  # (B, M, T)
        return self.log_keep, (self.shares * self.counts.gather(2, ids).transpose(1, 2)).sum(-1)

    def log_probabilities(self, logits: Tensor, row: int, places: Tensor) -> Tensor:
        """The head's logits (m, V), with or without padding, of a row's tokens at places (m,) ->
        log-probabilities.
        """
        log_keep, shares = self.log_keep[row, places], self.shares[row, places]
        by_head = logits.to(log_keep.dtype).log_softmax(-1) + log_keep.unsqueeze(-1)
        by_counts = shares @ self.counts[row, :, : logits.shape[-1]].to(shares.dtype)
        return torch.logaddexp(by_head, by_counts.log())


class TokenCounts(nn.Module):
    """The attention over earlier chunks and the gate. Replicated over TP ranks."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        shape, std = (config.head_size, config.hidden_size), config.init_std
        self.query = new_parameter(shape, grid, std=std)
        self.key = new_parameter(shape, grid, std=std)
        self.distance = new_parameter((max(config.egpt.num_chunks - 1, 1),), grid)
        self.gate = new_parameter((1, config.hidden_size), grid)
        self.gate_bias = new_parameter((1,), grid, mean=_GATE_BIAS)

    def forward(
        self,
        hidden: Tensor,
        features: Tensor,
        counts: Tensor,
        distance: Tensor,
        visible: Tensor,
    ) -> CountMixture:
        """Choose chunks, and how much of them.

        Args:
            hidden: (B, T, C), what the head reads.
            features: (B, M, P, C) of the earlier chunks.
            counts: (B, M, V); a chunk without tokens is not seen.
            distance: (T, M), how many chunks before the token's own; looked at where visible.
            visible: (B or 1, T, M).
        """
        precise = torch.promote_types(hidden.dtype, torch.float32)
        gate = (F.linear(hidden, self.gate) + self.gate_bias).to(precise)  # (B, T, 1)
        query = F.linear(hidden, self.query) * self.query.shape[0] ** -0.5  # (B, T, D)
        pooled = F.layer_norm(features.mean(2), features.shape[-1:])  # (B, M, C)
        scores = (query @ F.linear(pooled, self.key).transpose(1, 2)).to(precise)  # (B, T, M)
        scores = scores + self.distance[(distance - 1).clamp(0, len(self.distance) - 1)]
        sizes = counts.sum(-1).unsqueeze(1)  # (B, 1, M)
        visible = visible & (sizes > 0)
        nothing = ~visible.any(-1, keepdim=True)  # (B, T, 1)
        weights = scores.masked_fill(~visible, -torch.inf).masked_fill(nothing, 0.0).softmax(-1)
        shares = (gate.sigmoid() * weights / sizes.clamp(min=1)).masked_fill(nothing, 0.0)
        log_keep = F.logsigmoid(-gate).masked_fill(nothing, 0.0).squeeze(-1)
        return CountMixture(log_keep, shares, counts)
