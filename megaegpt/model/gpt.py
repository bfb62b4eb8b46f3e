"""GPT: token embedding, positions, blocks, (tied) head.

Shapes: B batch, T tokens, C hidden, V padded vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Literal

from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.errors import ConfigError
from megaegpt.labels import IGNORE
from megaegpt.model.attention.cache import CachedContext, KVCache
from megaegpt.model.attention.context import AttentionContext, CausalContext
from megaegpt.model.attention.cut_context import CutContext
from megaegpt.model.base import LanguageModel, Predictions
from megaegpt.model.block import BlockStack
from megaegpt.model.flops import attention_flops, matmul_flops
from megaegpt.model.head import OutputHead
from megaegpt.model.positions import AddedPositions
from megaegpt.model.rotary import rotary_table
from megaegpt.model.token_positions import place_tokens
from megaegpt.parallel.context_shards import ContextShards
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.layers import VocabParallelEmbedding
from megaegpt.parallel.rng import context_rng
from megaegpt.parallel.sequence import dropout


class GPT(LanguageModel):
    """A decoder-only language model (Radford et al., 2019), tensor-parallel over ``grid``."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.embedding = VocabParallelEmbedding(
            config.padded_vocab_size, config.vocab_size, config.hidden_size, grid, config.init_std
        )
        self.positions = AddedPositions(config, config.max_seq_len, grid, std=config.init_std)
        self.stack = BlockStack(config, grid)
        tied_to = self.embedding.weight if config.tied_embeddings else None
        self.head = OutputHead(config, grid, tied_to)

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
        cut: ContextShards | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final norm.

        Args:
            tokens: with a cache, those that follow the ones already in it; they are added to it.
            cache: keys and values of the tokens before.
            segments: (B, T) numbers of the texts in a row, negative at padding (see
                :mod:`megaegpt.model.segments`); by default what ``config.document_end`` says, or,
                behind the tokens of a cache, the text that is open there. Rows of a cache must be
                padded on the left.
            cut: compute the states of this rank's tokens alone, (B, n, C); without a cache.

        Raises:
            ConfigError: more tokens than the cache, or a learned position table, has room for.
        """
        length, start = tokens.shape[1], 0 if cache is None else cache.length
        positions, segments = place_tokens(tokens, cache, segments, self.config.document_end)
        self._check_length(positions, start + length)
        if cut is not None:
            tokens, positions = cut.own(tokens), cut.own(positions)
        shards = None if cache is not None else self.stack.shards(*tokens.shape)
        embedded = self.embedding(tokens, shards)
        rotary = rotary_table(self.config, positions, embedded.dtype)
        context: AttentionContext
        if cut is not None:
            context = CutContext(cut, rotary, segments, shards)
        elif cache is None:
            context = CausalContext(rotary, segments, shards)
        else:
            context = CachedContext(cache, length, rotary)
        if shards is not None:
            positions = shards.own(positions.expand(tokens.shape))
        x = self.positions(embedded, positions, shards)
        x = self.stack(dropout(x, self.config.dropout, self.training, shards), context)
        if cache is not None:
            cache.length += length
        return x

    def _check_length(self, positions: Tensor, columns: int) -> None:
        """Padding may take a row beyond the position table, its tokens not."""
        longest = self.config.max_seq_len
        if self.config.positions != "learned" or columns <= longest:
            return  # without a look at the positions, for which a GPU would have to be waited for
        length = int(positions.max()) + 1
        if length > longest:
            raise ConfigError(
                f"a text of {length} tokens is longer than the model's learned "
                f"positions: model.max_seq_len={longest}"
            )

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids and targets (-100: not predicted) -> nats, summed or of each position.

        In training, the ranks of a context-parallel group are given the same samples, and each
        computes its own tokens.
        """
        if not self.training or self.grid.cp_group is None:
            hidden = self.hidden_states(tokens, segments=segments)
            return self.head.loss(hidden, targets, reduction)
        cut = ContextShards(self.grid, tokens.shape[1])
        with context_rng(self.grid) if self.drops() else contextlib.nullcontext():
            hidden = self.hidden_states(tokens, segments=segments, cut=cut)
        return self.head.loss(hidden, cut.own(targets, IGNORE), reduction)

    def predictions(self, tokens: Tensor, segments: Tensor | None = None) -> Predictions:  # type: ignore[override]
        return Predictions(self.head, self.hidden_states(tokens, segments=segments))

    def logits(
        self, tokens: Tensor, cache: KVCache | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """(B, T) ids -> (B, T, V/tp), this rank's columns of the logits."""
        return self.head.logits(self.hidden_states(tokens, cache, segments))

    def flops_per_token(self) -> int:
        config = self.config
        forward = matmul_flops(self.stack) + 2 * config.vocab_size * config.hidden_size
        return 3 * (forward + attention_flops(config, config.max_seq_len))
