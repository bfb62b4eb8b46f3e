"""GPT: token embedding, positions, blocks, (tied) head.

Shapes: B batch, T tokens, C hidden, V padded vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.model.attention.cache import CachedContext, KVCache
from megaegpt.model.attention.context import AttentionContext, CausalContext
from megaegpt.model.block import BlockStack
from megaegpt.model.flops import attention_flops, matmul_flops
from megaegpt.model.head import OutputHead
from megaegpt.model.positions import AddedPositions, rotary_table
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import VocabParallelEmbedding
from megaegpt.parallel.params import count_parameters


class GPT(nn.Module):
    """A decoder-only language model (Radford et al., 2019), tensor-parallel over ``grid``."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.embedding = VocabParallelEmbedding(
            config.padded_vocab_size, config.vocab_size, config.hidden_size, grid, config.init_std
        )
        self.positions = AddedPositions(config, config.max_seq_len, grid)
        self.stack = BlockStack(config, grid)
        tied_to = self.embedding.weight if config.tied_embeddings else None
        self.head = OutputHead(config, grid, tied_to)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final LayerNorm.

        With a cache the tokens follow those already in it, and are added to it.
        """
        start, length = (0 if cache is None else cache.length), tokens.shape[1]
        positions = torch.arange(start, start + length, device=tokens.device)
        rotary = rotary_table(self.config, positions)
        context: AttentionContext
        if cache is None:
            context = CausalContext(rotary)
        else:
            context = CachedContext(cache, length, rotary)
        x = self.positions(self.embedding(tokens), positions)
        x = self.stack(F.dropout(x, self.config.dropout, self.training), context)
        if cache is not None:
            cache.length += length
        return x

    def forward(
        self, tokens: Tensor, targets: Tensor, reduction: Literal["sum", "none"] = "sum"
    ) -> Tensor:
        """(B, T) ids and targets (-100: not predicted) -> nats, summed or of each position."""
        return self.head.loss(self.hidden_states(tokens), targets, reduction)

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V/tp), this rank's columns of the logits."""
        return self.head.logits(self.hidden_states(tokens, cache))

    def num_parameters(self) -> int:
        """Parameters of the whole model over all TP ranks, the tied head once, padding rows
        included.
        """
        return count_parameters(self)

    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token of a full sequence, forward and
        backward.
        """
        config = self.config
        forward = matmul_flops(self.stack) + 2 * config.vocab_size * config.hidden_size
        return 3 * (forward + attention_flops(config, config.max_seq_len))
