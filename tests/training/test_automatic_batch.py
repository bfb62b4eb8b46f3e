"""auto becomes one number for all ranks, which a run keeps when it is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config import ParallelConfig
from megaegpt.config.loading import load_config
from megaegpt.config.run import RunConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.hardware import available_memory
from megaegpt.planning.memory import estimate_memory
from megaegpt.planning.micro_batch import possible_sizes, with_micro_batch
from megaegpt.training import automatic_batch
from megaegpt.training.automatic_batch import CPU_SHARE, memory_limit, settle_micro_batch
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, corpus, losses, run_config

__all__ = ["corpus"]


def _config(corpus: Path, folder: Path, **training: Any) -> RunConfig:
    values = {"global_batch_size": 8, "micro_batch_size": "auto", **training}
    return run_config("gpt", corpus, folder, training=values)


def _memory_for(config: RunConfig, size: int, dp_size: int = 1) -> int:
    """Free bytes of a machine, one rank of which can have a step with so many samples at once."""
    run = with_micro_batch(config, size)
    return int((estimate_memory(run, dp_size, "fp32", device_type="cpu").total + 1) / CPU_SHARE) + 1


def _settle(config: RunConfig, grid: ProcessGrid, recorded: int | None = None) -> tuple[int, str]:
    notices: list[str] = []
    found = settle_micro_batch(config, grid, "fp32", config.model.sample_len, recorded, notices)
    return found.training.chosen_micro_batch_size, "; ".join(notices)


# -- on a CPU --------------------------------------------------------------------------------------


def test_a_machine_is_filled_to_a_share_that_its_ranks_divide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(automatic_batch, "available_memory", lambda: 1000)
    cpu = torch.device("cpu")
    assert memory_limit(cpu, 1).size == 1000 * CPU_SHARE
    assert memory_limit(cpu, 2).size == 500 * CPU_SHARE
    assert "among 2 ranks" in memory_limit(cpu, 2).source


def test_a_container_has_no_more_than_its_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    assert available_memory(meminfo, tmp_path) == 5000 << 10
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(meminfo, tmp_path) == 5000 << 10
    (tmp_path / "memory.max").write_text("4000000\n")
    assert available_memory(meminfo, tmp_path) == 1_500_000


def test_a_run_that_goes_on_keeps_its_number_where_it_can(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path, global_batch_size=6)
    size, notice = _settle(config, ProcessGrid(), recorded=3)
    assert size == 3
    assert "stays 3, as in the checkpoint" in notice
    size, notice = _settle(config, ProcessGrid(), recorded=5)
    assert size in possible_sizes(config, 1)
    assert "cannot stay 5" in notice


def test_a_number_is_left_as_it_is(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path, micro_batch_size=4)
    assert _settle(config, ProcessGrid(), recorded=8) == (4, "")


# -- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "chosen", "words"),
    [
        ({4: 512}, 4, "and 0.50 GiB in a dry step, which may have 0.90 GiB (90% of what its GPU"),
        pytest.param(
            {4: None, 2: 1024, 1: 512},
            1,
            "; 2 takes 1.00 GiB in a dry step",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_dry_step_that_does_not_fit_is_made_again_with_fewer_samples(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taken: dict[int, int | None],
    chosen: int,
    words: str,
) -> None:
    """A GPU of 1 GiB, in which by the plan all samples of a rank fit at once."""
    unit = 1 << 20

    def dry_step(config: RunConfig, *_: object) -> int:
        bytes_taken = taken[config.training.chosen_micro_batch_size]
        if bytes_taken is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return bytes_taken * unit

    monkeypatch.setattr(automatic_batch, "dry_step", dry_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    grid = dataclasses.replace(ProcessGrid(), device=torch.device("cuda"))
    size, notice = _settle(_config(corpus, tmp_path, global_batch_size=4), grid)
    assert size == chosen
    assert words in notice
    assert "\n" not in notice


def test_another_error_of_a_dry_step_is_not_hidden(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dry_step(*_: object) -> int:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(automatic_batch, "dry_step", dry_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40, 2**40))
    grid = dataclasses.replace(ProcessGrid(), device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        _settle(_config(corpus, tmp_path, global_batch_size=1), grid)


def test_a_gpu_that_has_room_for_a_part_of_the_weights_makes_no_dry_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dry_step(*_: object) -> int:
        raise AssertionError("a dry step has all of them")

    monkeypatch.setattr(automatic_batch, "dry_step", dry_step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    grid = dataclasses.replace(ProcessGrid(), device=torch.device("cuda"))
    config = _config(corpus, tmp_path, global_batch_size=4)
    config = dataclasses.replace(config, parallel=ParallelConfig(zero_stage=3))
    size, notice = _settle(config, grid)
    assert size == 4
    assert "dry step" not in notice


# -- whole runs ------------------------------------------------------------------------------------


def _settle_with(config: RunConfig, memory: list[int]) -> int:
    grid = grid_for(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(automatic_batch, "available_memory", lambda: memory[grid.rank])
        size, notice = _settle(config, grid)
    assert "among 2 ranks" in notice
    return size


@pytest.mark.long
def test_ranks_agree_on_what_fits_the_one_with_least(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    config = _config(corpus, tmp_path)
    memory = [2 * _memory_for(config, size, dp_size=2) for size in (4, 2)]
    assert distributed(2, _settle_with, config, memory) == [2, 2]


def _run(config: RunConfig, memory: int, resume: bool = False, steps: int = 6) -> bool:
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(None):
        patched.setattr(automatic_batch, "available_memory", lambda: memory)
        return pretrain(config, grid_for(1), resume=resume, stops=StopAfter(steps))


def test_a_run_is_the_one_with_the_number_and_resumes_with_it_where_memory_is_less(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    auto = _config(corpus, tmp_path / "auto")
    fixed = _config(corpus, tmp_path / "fixed", micro_batch_size=4)
    memory = _memory_for(auto, 4)
    distributed(1, _run, fixed, memory)
    assert distributed(1, _run, auto, memory, False, 3) == [False]
    assert distributed(1, _run, auto, _memory_for(auto, 1), True) == [True]
    assert losses(tmp_path / "auto") == losses(tmp_path / "fixed")
    recorded = load_config(tmp_path / "auto" / "config.yaml")
    assert recorded.training.micro_batch_size == 4
