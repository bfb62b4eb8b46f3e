"""However one rank ends, all end soon, and one message says why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaegpt.errors import ConfigError, DataError
from megaegpt.parallel import watch
from megaegpt.parallel.launch import joined_processes
from tests.faults.processes import Ranks, train
from tests.tiny.runs import corpus, run_config

__all__ = ["corpus"]

WORLD = 3
STARTING_S, ENDING_S = 60, 12


def _end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "data":
        raise DataError("train.bin: the disk is gone")
    raise ValueError("a bug")


def work(how: str, where: int, in_collective: bool) -> None:
    """Add numbers up until rank ``where`` ends; the others wait for it, or do something else."""
    watch.GRACE_S = 1.0
    with joined_processes(1) as grid:
        for step in range(4):
            if step == 3 and grid.rank == where:
                print("ends now", flush=True)
                _end(how)
            if step == 3 and not in_collective:
                time.sleep(1000)
            dist.all_reduce(torch.ones(1000))


def fail_everywhere() -> None:
    """All ranks see the same mistake."""
    with joined_processes(1):
        error = ConfigError("model.hidden_size=7 is odd")
        error.on_every_rank = True
        raise error


def leave_apart() -> None:
    """Nothing is wrong: ranks leave one after the other."""
    with joined_processes(1) as grid:
        dist.barrier()
        time.sleep(0.2 * grid.rank)


_MESSAGES = {"killed": "ended without a message", "data": "error: train.bin", "bug": "a bug"}


@pytest.mark.parametrize(
    ("how", "where", "in_collective"),
    [
        ("killed", 0, True),
        ("killed", 2, True),
        ("killed", 0, False),
        ("killed", 2, False),
        ("data", 0, True),
        ("data", 2, False),
        ("bug", 0, False),
        ("bug", 2, True),
    ],
)
def test_all_ranks_end_with_one_message(
    tmp_path: Path, how: str, where: int, in_collective: bool
) -> None:
    ranks = Ranks(WORLD, tmp_path, work, how, where, in_collective)
    ranks.processes[where].join(STARTING_S)
    began = time.monotonic()
    codes = ranks.wait(ENDING_S)
    assert None not in codes, f"ranks {codes} still ran after {time.monotonic() - began:.0f} s"
    assert 0 not in codes
    texts = [ranks.shown(rank).replace("ends now\n", "") for rank in range(WORLD)]
    speaking = [rank for rank, text in enumerate(texts) if text.strip()]
    assert len(speaking) == 1, texts
    text = texts[speaking[0]]
    assert _MESSAGES[how] in text
    if how == "killed":
        assert f"rank {where} of {WORLD}" in text
        assert text.count("\n") == 1
    else:
        assert speaking == [where]
    if how == "bug":
        assert text.count("Traceback") == 1
        assert f"on rank {where} of {WORLD}, " in text


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("gpt", {"context_parallel_size": 2}),
        ("egpt", {"context_parallel_size": 3}),
        ("gpt", {"tensor_parallel_size": 2, "sequence_parallel": True}),
    ],
)
def test_a_rank_that_is_killed_in_a_step_ends_those_that_share_its_samples(
    corpus: Path, tmp_path: Path, kind: str, parallel: dict[str, Any]
) -> None:
    """Which wait for its part in the middle of a layer."""
    config = run_config(
        kind,
        corpus,
        tmp_path,
        parallel=parallel,
        training={"steps": 100_000, "eval_interval": 100_000},
        checkpoint={"interval": 100_000},
    )
    size = config.parallel.ranks_of_a_sample
    ranks = Ranks(size, tmp_path, train, config)
    deadline = time.monotonic() + STARTING_S
    while "| loss" not in ranks.shown(0):
        assert ranks.processes[0].is_alive(), ranks.shown(0)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks.kill(1)
    codes = ranks.wait(60)
    assert None not in codes
    assert 0 not in codes
    assert f"rank 1 of {size} ended without a message" in ranks.shown(0)


def test_an_error_that_all_ranks_meet_is_rank_0s_to_show(tmp_path: Path) -> None:
    ranks = Ranks(WORLD, tmp_path, fail_everywhere)
    assert ranks.wait(STARTING_S) == [2] * WORLD
    assert [ranks.shown(r) for r in range(WORLD)] == ["error: model.hidden_size=7 is odd\n", "", ""]


def test_ranks_that_are_done_leave_when_they_like(tmp_path: Path) -> None:
    ranks = Ranks(WORLD, tmp_path, leave_apart)
    assert ranks.wait(STARTING_S) == [0] * WORLD
    assert [ranks.shown(rank) for rank in range(WORLD)] == [""] * WORLD
