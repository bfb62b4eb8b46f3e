"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values of all heads come from one narrow latent a token, and only that is cached. Rotations
do not commute with the up-projections, so rotary positions get columns of their own: each query
head has ``rope_head_dim`` more, against one rotated key that all heads share.

While decoding, the up-projection of the keys is absorbed into the query and that of the values
into the output, so that attention runs on the cached latents as they are.

Shapes: B batch, T tokens, C hidden, L latent, R rotary part, H this rank's heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.model.attention.context import AttentionContext
from megaegpt.model.attention.layer import (
    AttentionLayer,
    attention_rng,
    merge_heads,
    split_heads,
)
from megaegpt.parallel.collectives import copy_to_tp
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import ColumnParallelLinear, Linear, RMSNorm, RowParallelLinear
from megaegpt.parallel.sequence import SequenceShards, enter_tp


class Latent(nn.Module):
    """A down-projection and, if the model has it, a norm; replicated: (B, T, C) -> (B, T, L)."""

    def __init__(self, config: ModelConfig, width: int, grid: ProcessGrid) -> None:
        super().__init__()
        self.down = Linear(config.hidden_size, width, grid, bias=config.bias, std=config.init_std)
        self.norm = RMSNorm(width, grid, eps=config.layer_norm_eps) if config.latent_norm else None

    def forward(self, x: Tensor, shards: SequenceShards | None) -> Tensor:
        """(B, T, C) -> (B, T, L), or this rank's rows (n, C) -> (n, L)"""
        latents = self.down(x, shards)
        return latents if self.norm is None else self.norm(latents, shards)


class LatentAttention(nn.Module):
    """Down-projections replicated, heads cut over TP.

    What is replicated enters the heads through ``copy_to_tp``: its gradient is summed there, so
    that every rank has the whole gradient of the down-projections. Under sequence parallelism they
    project a rank's own tokens, and latents are gathered, which are fewer numbers.
    """

    def __init__(self, config: ModelConfig, layer: int, grid: ProcessGrid) -> None:
        super().__init__()
        self.grid = grid
        self.trained_layer, self.evaluated_layer = AttentionLayer.both(config, layer)
        self.head_dim, self.rope_dim = config.head_size, config.rope_head_dim or 0
        self.latent_dim = config.latent_size
        hidden, std, width = config.hidden_size, config.init_std, config.num_heads * self.head_dim
        query_width = width + config.num_heads * self.rope_dim
        query_latent = config.query_latent_dim
        self.query_latent = Latent(config, query_latent, grid) if query_latent else None
        self.query = ColumnParallelLinear(
            query_latent or hidden, query_width, grid, bias=False, std=std
        )
        self.latent = Latent(config, self.latent_dim, grid)
        self.rope_key = (
            Linear(hidden, self.rope_dim, grid, bias=config.bias, std=std)
            if self.rope_dim
            else None
        )
        self.key, self.value = (
            ColumnParallelLinear(self.latent_dim, width, grid, bias=False, std=std)
            for _ in range(2)
        )
        self.output = RowParallelLinear(
            width, hidden, grid, bias=config.bias, std=config.residual_std
        )

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C), or this rank's rows (n, C) -> (n, C)"""
        q, q_rope = self._queries(x, context)
        latents, cut = self._latents(x, context), context.context_shards
        if cut is not None and not cut.divides(q.shape[1], q.shape[1]):
            latents = cut.gather(latents)  # of which heads are made for all tokens
        layer = self.trained_layer if self.training else self.evaluated_layer
        attend = self._attend_absorbed if context.absorbed else self._attend_expanded
        with attention_rng(self.grid, layer.dropout):
            y = attend(q, q_rope, latents, context, layer)  # (B, H, T, D)
        return self.output(merge_heads(y), context.shards)

    def _queries(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """(B, H, T, D) and, rotated, (B, H, T, R)"""
        if self.query_latent is not None:
            x = self.query_latent(x, context.shards)
        x = enter_tp(x, self.grid, context.shards)
        q = split_heads(self.query(x), self.head_dim + self.rope_dim)
        q, q_rope = q.split([self.head_dim, self.rope_dim], dim=-1)
        return q, q_rope if context.rotary is None else context.rotary.rotate(q_rope)

    def _latents(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Compute the cached vectors: latents with the shared rotary key behind them, (B, 1, T, L +
        R).
        """
        shards, rotary = context.shards, context.rotary
        latents = self.latent(x, shards)
        rope_key = None if rotary is None or self.rope_key is None else self.rope_key(x, shards)
        if shards is not None and rope_key is not None:  # rotated by the places of all tokens
            both = shards.gather(torch.cat([latents, rope_key], dim=-1))
            latents, rope_key = both.split([self.latent_dim, self.rope_dim], dim=-1)
        elif shards is not None:
            latents = shards.gather(latents)
        latents = latents.unsqueeze(1)
        if rotary is not None and rope_key is not None:
            latents = torch.cat([latents, rotary.rotate(rope_key.unsqueeze(1))], dim=-1)
        return latents if shards is not None else copy_to_tp(latents, self.grid)

    def _attend_expanded(
        self,
        q: Tensor,
        q_rope: Tensor,
        latents: Tensor,
        context: AttentionContext,
        layer: AttentionLayer,
    ) -> Tensor:
        """Keys and values of every head. Values are filled up with zeros to the keys' width,
        which fused kernels ask for.
        """
        latent, rope_key = latents.split([self.latent_dim, self.rope_dim], dim=-1)
        latent = latent.squeeze(1)
        k = split_heads(self.key(latent), self.head_dim)
        v = split_heads(self.value(latent), self.head_dim)
        if self.rope_dim:
            q = torch.cat([q, q_rope], dim=-1)  # (B, H, T, D + R)
            k = torch.cat([k, rope_key.expand(-1, k.shape[1], -1, -1)], dim=-1)
            v = F.pad(v, (0, self.rope_dim))
        y = context.attend(q, k, v, layer)
        return y[..., : self.head_dim]

    def _attend_absorbed(
        self,
        q: Tensor,
        q_rope: Tensor,
        latents: Tensor,
        context: AttentionContext,
        layer: AttentionLayer,
    ) -> Tensor:
        """Scores of q W_k against the latents; their weighted sum is projected up at the end.

        A context scales scores by the width it is given, L + R: the query makes up for it.
        """
        key_up, value_up = (
            layer.full_weight().view(-1, self.head_dim, self.latent_dim)  # (H, D, L)
            for layer in (self.key, self.value)
        )
        width = self.latent_dim + self.rope_dim
        q = torch.cat([q @ key_up, q_rope], dim=-1)  # (B, H, T, L + R)
        q = q * (width / (self.head_dim + self.rope_dim)) ** 0.5
        y = context.attend(q, latents, latents, layer)
        return y[..., : self.latent_dim] @ value_up.transpose(1, 2)
