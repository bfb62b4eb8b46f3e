"""Multi-head, grouped-query (Ainslie et al., arXiv 2305.13245) and multi-query attention.

Shapes: B batch, T tokens, C hidden, H heads, K kv heads, D head dim; H and K are this rank's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.model.attention.context import AttentionContext
from megaegpt.model.attention.layer import (
    AttentionLayer,
    attention_rng,
    merge_heads,
    split_heads,
)
from megaegpt.parallel.collectives import copy_to_tp
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import (
    ColumnParallelLinear,
    ColumnParallelRMSNorm,
    HeadRMSNorm,
    Linear,
    RowParallelLinear,
    column_parallel,
)
from megaegpt.parallel.low_rank import LowRankAdapter
from megaegpt.parallel.sequence import SequenceShards


class SharedKVLinear(Linear):
    """Key or value projection with fewer heads than TP ranks: replicated, each rank uses one head.

    The copy operator on the weight sums the gradients of the ranks' different uses, so the
    replicas stay equal and export needs no special case.
    """

    def __init__(
        self,
        in_size: int,
        kv_heads: int,
        head_dim: int,
        grid: ProcessGrid,
        *,
        bias: bool,
        std: float,
    ) -> None:
        super().__init__(in_size, kv_heads * head_dim, grid, bias=bias, std=std)
        self.head_dim = head_dim
        self.head = grid.tp_rank * kv_heads // grid.tp_size

    def factors(self, shards: SequenceShards | None = None) -> tuple[Tensor, Tensor | None]:
        """(D, C) and (D,) of this rank's head."""
        weight = copy_to_tp(self.weight, self.grid)[self._rows]
        bias = None if self.bias is None else copy_to_tp(self.bias, self.grid)[self._rows]
        return weight, bias

    def add_adapter(self, config: LoRAConfig) -> None:
        """As every rank has the whole weight, so it has the whole adapter."""
        out_size, in_size = self.weight.shape
        self.lora = LowRankAdapter(
            in_size, out_size, self.grid, config, tp_dim=None, head_rows=self._rows
        )

    @property
    def _rows(self) -> slice:
        return slice(self.head * self.head_dim, (self.head + 1) * self.head_dim)


class GroupedQueryAttention(nn.Module):
    """Heads cut over TP: the query, key and value projections by column, the output by row."""

    def __init__(self, config: ModelConfig, layer: int, grid: ProcessGrid) -> None:
        super().__init__()
        self.grid, self.head_dim = grid, config.head_size
        self.trained_layer, self.evaluated_layer = AttentionLayer.both(config, layer)
        hidden, std = config.hidden_size, config.init_std
        width = config.num_heads * config.head_size
        self.query = ColumnParallelLinear(hidden, width, grid, bias=config.has_qkv_bias, std=std)
        self.key, self.value = (self._kv_projection(config) for _ in range(2))
        self.query_norm, self.key_norm = (
            _query_key_norm(config, heads, grid) for heads in (config.num_heads, config.kv_heads)
        )
        self.norm_by_head = config.qk_norm == "head"
        self.output = RowParallelLinear(
            width, hidden, grid, bias=config.bias, std=config.residual_std
        )

    def _kv_projection(self, config: ModelConfig) -> Linear:
        hidden, heads, grid = config.hidden_size, config.kv_heads, self.grid
        bias, std = config.has_qkv_bias, config.init_std
        if heads < grid.tp_size:
            return SharedKVLinear(hidden, heads, self.head_dim, grid, bias=bias, std=std)
        return ColumnParallelLinear(hidden, heads * self.head_dim, grid, bias=bias, std=std)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """(B, T, C) -> (B, T, C), or this rank's rows (n, C) -> (n, C)"""
        layers = [self.query, self.key, self.value]
        projected = column_parallel(x, layers, self.grid, context.shards)
        return self.output(self.attend(projected, context), context.shards)

    def attend(self, projected: Sequence[Tensor], context: AttentionContext) -> Tensor:
        """Queries (B, T, H * D), keys and values (B, T, K * D) as their projections give them ->
        (B, T, H * D), what the output's projection is given.
        """
        q, k, v = projected
        q, k = self._heads(q, self.query_norm), self._heads(k, self.key_norm)
        v = split_heads(v, self.head_dim)
        if context.rotary is not None:
            q, k = context.rotary.rotate(q), context.rotary.rotate(k)
        layer = self.trained_layer if self.training else self.evaluated_layer
        with attention_rng(self.grid, layer.dropout):
            y = context.attend(q, k, v, layer)  # (B, H, T, D)
        return merge_heads(y)

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, T, H * D) -> (B, H, T, D), normed"""
        if norm is None:
            return split_heads(x, self.head_dim)
        if self.norm_by_head:
            return norm(split_heads(x, self.head_dim))
        return split_heads(norm(x), self.head_dim)


def _query_key_norm(config: ModelConfig, heads: int, grid: ProcessGrid) -> nn.Module | None:
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "head":
        return HeadRMSNorm(config.head_size, grid, eps=config.layer_norm_eps)
    return ColumnParallelRMSNorm(heads * config.head_size, grid, eps=config.layer_norm_eps)
