"""What ranks agree on: one computes, all know; one fails, all fail."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megaegpt.errors import DataError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import (
    all_gather_object,
    all_reduce_max,
    broadcast_object,
    start_all_reduce_max,
)
from tests.distributed.harness import Distributed, grid_for


def _ask_rank_0() -> tuple[list[int], list[str], tuple[str, bool], list[int]]:
    grid = grid_for(1)
    called: list[int] = []

    def make() -> list[int]:
        called.append(grid.rank)
        return [7, grid.rank]

    def fail() -> int:
        raise DataError("the disk is gone")

    value = broadcast_object(make, grid)
    error: tuple[str, bool] = ("", False)
    try:
        broadcast_object(fail, grid)
    except DataError as caught:
        error = (str(caught), caught.on_every_rank)
    everyone = all_gather_object(f"rank {grid.rank}: {value} {called}", grid)
    return called, everyone, error, all_reduce_max([grid.rank, -grid.rank], grid)


def test_a_value_of_rank_0s_is_made_there_alone_and_so_is_its_error(
    distributed: Distributed,
) -> None:
    first, second = distributed(2, _ask_rank_0)
    assert first[0] == [0]
    assert second[0] == []
    assert first[1] == second[1] == ["rank 0: [7, 0] [0]", "rank 1: [7, 0] []"]
    assert first[2] == ("the disk is gone", True)
    assert second[2] == ("rank 0: the disk is gone", True)
    assert first[3] == second[3] == [1, 0]


def _ask_before_the_other_rank() -> list[int]:
    grid = grid_for(1)
    token = torch.zeros(1)
    if grid.is_main:
        answers = start_all_reduce_max([3, 4], grid)
        dist.send(token, 1)
    else:
        dist.recv(token, 0)  # comes if rank 0 does not wait for this one
        answers = start_all_reduce_max([5, 2], grid)
    return answers()


def test_a_rank_goes_on_while_the_others_have_not_been_asked(distributed: Distributed) -> None:
    assert distributed(2, _ask_before_the_other_rank) == [[5, 4], [5, 4]]
    assert start_all_reduce_max([1, 2], ProcessGrid())() == [1, 2]


def test_alone_nothing_is_sent() -> None:
    assert broadcast_object(lambda: "here", ProcessGrid()) == "here"
    with pytest.raises(DataError, match="gone"):
        broadcast_object(mock.Mock(side_effect=DataError("gone")), ProcessGrid())


def _options_of_groups() -> list[dict[str, Any]]:
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as made:
        grid = ProcessGrid.create(1)
    assert grid.control_group is not None
    return [call.kwargs for call in made.call_args_list]


def test_what_is_agreed_on_outside_of_a_step_waits_longer_and_without_a_gpu(
    distributed: Distributed,
) -> None:
    for options in distributed(2, _options_of_groups):
        assert {"backend": "gloo", "timeout": timedelta(hours=2)} in options
