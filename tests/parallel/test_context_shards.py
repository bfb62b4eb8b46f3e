"""Tokens cut over two ranks in zig-zag, against the same tokens on one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaegpt.parallel.context_shards import ContextShards
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for

ROWS, HEADS, WIDTH = 2, 4, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_rank_has_a_piece_from_the_front_and_its_mirror_image() -> None:
    """Padding is at the end of the last pieces."""
    owned = [ContextShards(ProcessGrid(cp_rank=r, cp_size=3), 16) for r in range(3)]
    positions = [shards.own(torch.arange(16), -1).tolist() for shards in owned]
    assert positions == [
        [0, 1, 2, 15, -1, -1],
        [3, 4, 5, 12, 13, 14],
        [6, 7, 8, 9, 10, 11],
    ]


def test_ranks_have_equally_many_tokens_before_theirs() -> None:
    owned = [ContextShards(ProcessGrid(cp_rank=r, cp_size=4), 64) for r in range(4)]
    seen = {int(shards.own(torch.arange(64)).sum()) for shards in owned}
    assert seen == {63 * 64 // 2 // 4}


def check_ways(length: int) -> None:
    shards = ContextShards(grid_for(1, 2), length)
    rank, tokens = shards.grid.cp_rank, torch.arange(4 * shards.piece)
    x, along = (random(ROWS, HEADS, len(tokens), WIDTH, seed=n) for n in (0, 1))  # of all tokens
    places = torch.cat([tokens[start : start + shards.piece] for start in shards.starts])
    ours = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)

    own = x[:, :, places].requires_grad_()
    everything = shards.gather(own)
    assert everything.equal(x)
    (everything * along * (1 + rank)).sum().backward()  # ranks use it differently
    assert own.grad is not None
    torch.testing.assert_close(own.grad, 3 * along[:, :, places])

    own = x[:, :, places].requires_grad_()
    heads = shards.to_heads(own)
    assert heads.equal(x[:, ours])
    (heads * along[:, ours]).sum().backward()
    assert own.grad is not None
    assert own.grad.equal(along[:, :, places])

    heads = x[:, ours].clone().requires_grad_()
    back = shards.to_tokens(heads)
    assert back.equal(x[:, :, places])
    (back * along[:, :, places]).sum().backward()
    assert heads.grad is not None
    assert heads.grad.equal(along[:, ours])


@pytest.mark.parametrize("length", [8, 5, 1])
def test_tokens_are_gathered_and_exchanged_for_heads(distributed: Distributed, length: int) -> None:
    distributed(2, check_ways, length)
