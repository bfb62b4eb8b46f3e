"""Chunk parallelism: the chunks of an EGPT's window over the ranks of a context-parallel group.

Encoder and decoder work on a chunk by itself, so a rank does it for its own chunks alone. What one
chunk shows to later ones is small (a few features, a short key a token), and only that is gathered;
attention over all tokens, which context parallelism cuts otherwise, there is none to cut.

A token is compared with the keys of all chunks before its own, so a later chunk is more work.
Chunks are dealt in rounds whose direction changes, as 0 1 2 3 | 3 2 1 0 | ...: after every second
round the ranks have equal shares of early and late ones.

Shapes: B batch, N chunks of a window, n = N / cp chunks of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.sequence import all_gather_single, reduce_scatter_single


def chunks_of_rank(rank: int, ranks: int, chunks: int) -> list[int]:
    """The numbers of a rank's chunks, ascending.

    Args:
        chunks: of the window, a multiple of ``ranks``.

    Example:
        >>> [chunks_of_rank(rank, 2, 8) for rank in range(2)]
        [[0, 3, 4, 7], [1, 2, 5, 6]]
    """
    if chunks % ranks:
        raise ValueError(f"{chunks} chunks cannot be dealt to {ranks} ranks alike")
    return [_chunk(rank, turn, ranks) for turn in range(chunks // ranks)]


def _chunk(rank: Any, turn: Any, ranks: int) -> Any:
    """The number of the chunk that a rank is dealt in a round; of numbers, or tensors of them."""
    return turn * ranks + _mirrored(rank, turn, ranks)


def _mirrored(place: Any, turn: Any, ranks: int) -> Any:
    """The place of a rank in a round, or the rank of a place."""
    return place + turn % 2 * (ranks - 1 - 2 * place)


@dataclass(frozen=True)
class ChunkShares:
    """Which chunks each rank of a context-parallel group has, and the ways between."""

    grid: ProcessGrid
    """With a context-parallel group."""

    def whole(self, own: int) -> int:
        """N of a window of whose chunks this rank has ``own``."""
        return own * self.grid.cp_size

    def numbers(self, chunks: int) -> list[int]:
        """This rank's chunks (n) of a window's, ascending."""
        return chunks_of_rank(self.grid.cp_rank, self.grid.cp_size, chunks)

    def places(self, chunks: int, device: torch.device) -> Tensor:
        """The same on a device, which is not waited for."""
        turns = torch.arange(chunks // self.grid.cp_size, device=device)
        return _chunk(self.grid.cp_rank, turns, self.grid.cp_size)

    def own(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, n, ...) of this rank, a copy."""
        return x[:, self.places(x.shape[1], x.device)]

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Every rank's own (..., n, ...) along ``dim`` -> (..., N, ...) in the window's order.

        Backward, the ranks' gradients are summed, and each has those of its chunks.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return _GatherChunks.apply(x, self, dim)
        return _gathered(x, self, dim)


class _GatherChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: ChunkShares, dim: int) -> Tensor:
        ctx.shares, ctx.dim = shares, dim
        return _gathered(x, shares, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grid, dim = ctx.shares.grid, ctx.dim
        grad = grads[0].movedim(dim, 0)  # (N, ...)
        count = len(grad) // grid.cp_size
        place = torch.arange(len(grad), device=grad.device)  # among the first rank's, the second's
        by_rank = grad[_chunk(place // count, place % count, grid.cp_size)]
        own = by_rank.new_empty(count, *by_rank.shape[1:])
        reduce_scatter_single(own, by_rank, group=grid.cp_group)
        return own.movedim(0, dim), None, None


def _gathered(x: Tensor, shares: ChunkShares, dim: int) -> Tensor:
    grid, own = shares.grid, x.movedim(dim, 0).contiguous()  # (n, ...)
    by_rank = own.new_empty(grid.cp_size * len(own), *own.shape[1:])
    all_gather_single(by_rank, own, group=grid.cp_group)
    number = torch.arange(len(by_rank), device=x.device)
    turn = number // grid.cp_size
    rank = _mirrored(number % grid.cp_size, turn, grid.cp_size)
    return by_rank[rank * len(own) + turn].movedim(0, dim)
