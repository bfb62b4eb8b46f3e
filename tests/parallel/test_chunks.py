"""Chunks dealt to the ranks of a context-parallel group, and what is gathered of them."""

from __future__ import annotations

import pytest
import torch

from megaegpt.parallel.chunks import ChunkShares, chunks_of_rank
from tests.distributed.harness import Distributed, grid_for


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 3), (2, 2), (2, 12), (4, 8), (4, 16)])
def test_ranks_have_equal_shares_of_early_and_late_chunks(ranks: int, chunks: int) -> None:
    dealt = [chunks_of_rank(rank, ranks, chunks) for rank in range(ranks)]
    assert sorted(number for share in dealt for number in share) == list(range(chunks))
    assert all(share == sorted(share) for share in dealt)
    seen = [sum(share) for share in dealt]  # keys that a chunk is compared with grow by its number
    assert max(seen) - min(seen) <= (0 if chunks // ranks % 2 == 0 else ranks - 1)


def test_chunks_that_are_not_one_for_every_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="9 chunks cannot be dealt to 2 ranks alike"):
        chunks_of_rank(0, 2, 9)


def check_ways_between(chunks: int) -> None:
    shares = ChunkShares(grid_for(1, 2))
    rank = shares.grid.cp_rank
    generator = torch.Generator().manual_seed(0)
    whole, first, second = torch.randn(3, 2, chunks, 3, generator=generator, dtype=torch.float64)
    own = whole[:, shares.numbers(chunks)]
    assert shares.own(whole).equal(own)
    assert shares.places(chunks, whole.device).tolist() == shares.numbers(chunks)
    assert shares.whole(own.shape[1]) == chunks
    assert shares.gather(own).equal(whole)
    assert shares.gather(own.transpose(0, 1), dim=0).equal(whole.transpose(0, 1))

    x = own.clone().requires_grad_()
    (shares.gather(x) * (first, second)[rank]).sum().backward()  # ranks use it differently
    torch.testing.assert_close(x.grad, shares.own(first + second), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [2, 6, 8])
def test_chunks_are_gathered_in_the_order_of_the_window(
    distributed: Distributed, chunks: int
) -> None:
    distributed(2, check_ways_between, chunks)
