"""Context parallelism: the ranks of a group share the tokens of their samples, and everything but
attention is computed for a rank's own tokens alone.

A causal token's attention costs as much as there are tokens before it. So a sequence is cut into
2 * cp pieces of which rank r has the r-th from the front and the r-th from the end (zig-zag, as in
Llama 3, arXiv 2407.21783, section 3.3.2), and all ranks have as much to do. Where heads divide over
the ranks, attention exchanges a rank's tokens of all heads for all tokens of some heads
(DeepSpeed-Ulysses, arXiv 2309.14509); else it gathers keys and values, for a rank's own queries.

Shapes: B batch, T tokens, p tokens of a piece, n = 2 * p tokens of a rank, T' = cp * n tokens with
padding, H heads, D head dim, cp ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.sequence import all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class ContextShards:
    """Which tokens of every sequence each rank of a context-parallel group has.

    Where T tokens do not divide into pieces, padding follows the last one: no token sees it.
    """

    grid: ProcessGrid
    """With a context-parallel group."""
    length: int
    """T"""

    @property
    def piece(self) -> int:
        """p"""
        return -(-self.length // (2 * self.grid.cp_size))

    @property
    def starts(self) -> tuple[int, int]:
        """Places in the sequence at which this rank's two pieces begin."""
        first, last = self.grid.cp_rank, 2 * self.grid.cp_size - 1 - self.grid.cp_rank
        return first * self.piece, last * self.piece

    def divides(self, heads: int, kv_heads: int) -> bool:
        """Whether each rank can have some of a tensor-parallel rank's query heads, and whole the
        key heads that they read.
        """
        ranks = self.grid.cp_size
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    def padded(self, x: Tensor, value: int) -> Tensor:
        """(..., T) -> (..., T')"""
        missing = 2 * self.grid.cp_size * self.piece - self.length
        return torch.nn.functional.pad(x, (0, missing), value=value) if missing else x

    def own(self, x: Tensor, value: int = 0) -> Tensor:
        """Numbers of all tokens, (..., T), without a gradient -> those of this rank's, (..., n),
        with ``value`` for padding.
        """
        x = self.padded(x, value)
        return torch.cat([x[..., start : start + self.piece] for start in self.starts], dim=-1)

    def gather(self, x: Tensor) -> Tensor:
        """This rank's tokens (B, H, n, D) -> those of all ranks in order, (B, H, T', D). Backward,
        the ranks' gradients are summed, and each has those of its tokens.
        """
        return _Gather.apply(x, self)

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of this rank's tokens, (B, H, n, D) -> this rank's heads of all tokens in
        order, (B, H / cp, T', D).
        """
        return _ToHeads.apply(x, self)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: (B, H / cp, T', D) -> (B, H, n, D)"""
        return _ToTokens.apply(x, self)

    def in_order(self, x: Tensor) -> Tensor:
        """The tokens of every rank, (cp, B, H, n, D) -> (B, H, T', D)"""
        halves = x.unflatten(3, (2, self.piece))
        pieces = torch.cat([halves[:, :, :, 0], halves[:, :, :, 1].flip(0)])  # (2 cp, B, H, p, D)
        return pieces.movedim(0, 2).flatten(2, 3)

    def by_rank(self, x: Tensor) -> Tensor:
        """(B, H, T', D) -> the tokens of every rank, (cp, B, H, n, D)"""
        pieces = x.unflatten(2, (-1, self.piece)).movedim(2, 0)  # (2 cp, B, H, p, D)
        front, back = pieces.chunk(2)
        return torch.stack([front, back.flip(0)], dim=3).flatten(3, 4)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ContextShards) -> Tensor:
        ctx.shards = shards
        ranks = shards.grid.cp_size
        everything = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        all_gather_single(everything, x.contiguous(), group=shards.grid.cp_group)
        return shards.in_order(everything.unflatten(0, (ranks, -1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts = ctx.shards.by_rank(grads[0])
        own = parts.new_empty(parts.shape[1:])
        reduce_scatter_single(own, parts.flatten(0, 1), group=ctx.shards.grid.cp_group)
        return own, None


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ContextShards) -> Tensor:
        ctx.shards = shards
        return _heads_of_all_tokens(x, shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _tokens_of_all_heads(grads[0], ctx.shards), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ContextShards) -> Tensor:
        ctx.shards = shards
        return _tokens_of_all_heads(x, shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _heads_of_all_tokens(grads[0], ctx.shards), None


def _heads_of_all_tokens(x: Tensor, shards: ContextShards) -> Tensor:
    """(B, H, n, D) -> (B, H / cp, T', D)"""
    by_heads = x.unflatten(1, (shards.grid.cp_size, -1)).movedim(1, 0)  # (cp, B, H / cp, n, D)
    return shards.in_order(_exchanged(by_heads, shards.grid))


def _tokens_of_all_heads(x: Tensor, shards: ContextShards) -> Tensor:
    """(B, H / cp, T', D) -> (B, H, n, D)"""
    return _exchanged(shards.by_rank(x), shards.grid).movedim(0, 1).flatten(1, 2)


def _exchanged(x: Tensor, grid: ProcessGrid) -> Tensor:
    """(cp, ...), what goes to each rank -> (cp, ...), what came from each"""
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=grid.cp_group)
    return received
