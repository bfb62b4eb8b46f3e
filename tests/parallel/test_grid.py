"""The process grid: neighbours share a model, and what does not divide is refused."""

import pytest
import torch.distributed as dist

from megaegpt.errors import LaunchError
from megaegpt.parallel.grid import DeepSpeedMpu, ProcessGrid
from tests.distributed.harness import grid_for


def test_a_process_alone_is_a_grid_of_one():
    grid = ProcessGrid.create(1)
    assert (grid.world_size, grid.rank, grid.is_main) == (1, 0, True)
    assert grid.tp_group is None
    assert grid.dp_group is None


def _refusal(tp_size: int, cp_size: int = 1) -> str:
    with pytest.raises(LaunchError) as refused:
        ProcessGrid.create(tp_size, cp_size=cp_size)
    return str(refused.value)


def test_tensor_parallelism_without_enough_processes_says_how_to_start_them(distributed):
    """Whether the process has joined a group of one, as every program has, or none."""
    assert "needs 2 processes, not 1: start with `torchrun --nproc_per_node 2`" in _refusal(2)
    [joined] = distributed(1, _refusal, 2)
    assert joined == _refusal(2)


@pytest.mark.parametrize("tp_size", [0, -1])
def test_a_tensor_parallel_size_that_is_no_number_of_ranks_is_refused(distributed, tp_size):
    told = f"parallel.tensor_parallel_size={tp_size} must be at least 1"
    assert _refusal(tp_size) == told
    assert distributed(1, _refusal, tp_size) == [told]


def test_a_context_parallel_size_that_does_not_fit_the_processes_is_refused():
    assert _refusal(1, 0) == "parallel.context_parallel_size=0 must be at least 1"
    assert _refusal(2, 2) == (
        "parallel.tensor_parallel_size=2 x parallel.context_parallel_size=2 needs 4 processes, "
        "not 1: start with `torchrun --nproc_per_node 4` or `deepspeed --num_gpus 4`"
    )


def _describe_grid() -> dict:
    grid = grid_for(2)
    mpu = DeepSpeedMpu(grid)
    return {
        "place": (grid.rank, grid.tp_rank, grid.dp_rank, grid.tp_size, grid.dp_size),
        "tp_ranks": dist.get_process_group_ranks(grid.tp_group),
        "dp_ranks": dist.get_process_group_ranks(grid.dp_group),
        "mpu_dp_ranks": mpu.get_data_parallel_group_ranks(),
        "mpu_src": mpu.get_tensor_model_parallel_src_rank(),
        "refused": _refusal(3),
    }


def test_tensor_parallel_ranks_are_neighbours(distributed):
    grids = distributed(4, _describe_grid)
    assert [g["place"] for g in grids] == [
        (0, 0, 0, 2, 2),
        (1, 1, 0, 2, 2),
        (2, 0, 1, 2, 2),
        (3, 1, 1, 2, 2),
    ]
    assert [g["tp_ranks"] for g in grids] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["dp_ranks"] for g in grids] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [g["mpu_dp_ranks"] for g in grids] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [g["mpu_src"] for g in grids] == [0, 0, 2, 2]
    assert all("groups of 3" in g["refused"] for g in grids)


def _describe_replicas(tp_size: int, cp_size: int) -> dict:
    grid = grid_for(tp_size, cp_size)
    mpu, groups = DeepSpeedMpu(grid), (grid.tp_group, grid.cp_group, grid.dp_group)
    return {
        "place": (grid.rank, grid.tp_rank, grid.cp_rank, grid.dp_rank, grid.replica_rank),
        "groups": [None if g is None else dist.get_process_group_ranks(g) for g in groups],
        "replicas": dist.get_process_group_ranks(grid.replica_group),
        "mpu": (
            mpu.get_data_parallel_rank(),
            mpu.get_data_parallel_world_size(),
            dist.get_process_group_ranks(mpu.get_data_parallel_group()),
            mpu.get_data_parallel_group_ranks(),
            mpu.get_tensor_model_parallel_src_rank(),
        ),
        "refused": _refusal(1, 3),
    }


def test_context_parallel_ranks_are_neighbours_among_the_replicas_of_the_weights(distributed):
    grids = distributed(4, _describe_replicas, 1, 2)
    assert [g["place"] for g in grids] == [
        (0, 0, 0, 0, 0),
        (1, 0, 1, 0, 1),
        (2, 0, 0, 1, 2),
        (3, 0, 1, 1, 3),
    ]
    assert [g["groups"] for g in grids] == [
        [None, [0, 1], [0, 2]],
        [None, [0, 1], [1, 3]],
        [None, [2, 3], [0, 2]],
        [None, [2, 3], [1, 3]],
    ]
    everyone = [0, 1, 2, 3]
    assert all(g["replicas"] == everyone for g in grids)
    assert [g["mpu"] for g in grids] == [(r, 4, everyone, everyone, r) for r in everyone]
    assert all(
        "4 processes cannot be divided into tensor- and context-parallel groups of 3"
        in g["refused"]
        for g in grids
    )


def test_tensor_parallel_ranks_are_nearer_than_context_parallel_ones(distributed):
    grids = distributed(4, _describe_replicas, 2, 2)
    assert [g["place"] for g in grids] == [
        (0, 0, 0, 0, 0),
        (1, 1, 0, 0, 0),
        (2, 0, 1, 0, 1),
        (3, 1, 1, 0, 1),
    ]
    assert [g["groups"] for g in grids] == [
        [[0, 1], [0, 2], None],
        [[0, 1], [1, 3], None],
        [[2, 3], [0, 2], None],
        [[2, 3], [1, 3], None],
    ]
    assert [g["replicas"] for g in grids] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [g["mpu"][4] for g in grids] == [0, 0, 2, 2]
