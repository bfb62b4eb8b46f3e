"""DeepGPT, EGPT's baseline without history: ordinary causal blocks over the frozen encoder's
states of a chunk.

Shapes: B batch, N chunks, S chunk size, C hidden.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.model.attention.cache import CachedContext, KVCache
from megaegpt.model.attention.context import AttentionContext, CausalContext
from megaegpt.model.base import LanguageModel, Predictions
from megaegpt.model.block import BlockStack
from megaegpt.model.flops import attention_flops, matmul_flops
from megaegpt.model.head import OutputHead
from megaegpt.model.rotary import rotary_table
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.rng import context_rng
from megaegpt.parallel.sequence import dropout


class DeepGPT(LanguageModel):
    """Blocks and head over encoder states, which already know their positions: none are added."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.stack = BlockStack(config, grid)
        self.head = OutputHead(config, grid)

    def decode(self, token_states: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) states of a chunk's first or (with a cache) next tokens -> (B, T, C)."""
        start, length = (0 if cache is None else cache.length), token_states.shape[1]
        positions = torch.arange(start, start + length, device=token_states.device)
        rotary = rotary_table(self.config, positions, token_states.dtype)
        context: AttentionContext
        if cache is None:
            shards = self.stack.shards(*token_states.shape[:2])
            context = CausalContext(rotary, shards=shards)
        else:
            shards, context = None, CachedContext(cache, length, rotary)
        x = token_states if shards is None else shards.own(token_states)
        x = self.stack(dropout(x, self.config.dropout, self.training, shards), context)
        if cache is not None:
            cache.length += length
        return x

    def hidden_states(self, token_states: Tensor) -> Tensor:
        """(B, N, S, C) -> (B, N, S, C), every chunk by itself"""
        x = self.decode(token_states.flatten(0, 1))
        return x.unflatten(0, token_states.shape[:2])

    def forward(
        self, token_states: Tensor, targets: Tensor, reduction: Literal["sum", "none"] = "sum"
    ) -> Tensor:
        """States (B, N, S, C), targets (B, N, S) -> nats; under chunk parallelism those of this
        rank's chunks.
        """
        drops = self.training and self.drops()
        with context_rng(self.grid) if drops else contextlib.nullcontext():
            hidden = self.hidden_states(token_states)
        return self.head.loss(hidden, targets, reduction)

    def predictions(self, token_states: Tensor) -> Predictions:  # type: ignore[override]
        return Predictions(self.head, self.hidden_states(token_states))

    def flops_per_token(self) -> int:
        config = self.config
        forward = matmul_flops(self.stack) + attention_flops(config, config.egpt.chunk_size)
        return 3 * (forward + 2 * config.vocab_size * config.hidden_size)
