"""Dropout seeds: common to a TP group where activations are replicated, its ranks' own where
sharded.
"""

import torch

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.rng import derive_seed, seed_micro_step, sharded_rng
from tests.distributed.harness import grid_for


def test_seeds_differ_between_steps_micro_steps_and_ranks():
    draws = set()
    for place in [(1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (2, 0, 0, 0)]:
        seed_micro_step(*place)
        draws.add(torch.rand(()).item())
    assert len(draws) == 5
    seed_micro_step(1, 0, 0, 0)
    assert torch.rand(()).item() in draws
    assert 0 <= derive_seed("a", 1) < 2**63


def test_without_tensor_parallelism_the_stream_is_untouched():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with sharded_rng(ProcessGrid()):
        first = torch.rand(())
    assert torch.equal(torch.stack([first, torch.rand(())]), expected)


def _draw() -> tuple[list[float], list[float]]:
    grid = grid_for(2)
    seed_micro_step(7, 0, 0, grid.dp_rank)
    common, sharded = [], []
    for _ in range(3):
        common.append(torch.rand(()).item())
        with sharded_rng(grid):
            sharded.append(torch.rand(()).item())
    return common, sharded


def test_tp_ranks_share_the_common_stream_and_differ_in_the_sharded_one(distributed):
    (common_0, sharded_0), (common_1, sharded_1) = distributed(2, _draw)
    assert common_0 == common_1
    assert len(set(sharded_0 + sharded_1)) == 6
