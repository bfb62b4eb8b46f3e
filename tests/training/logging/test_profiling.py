"""A window of steps is profiled, and only that."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from megaegpt.config import LoggingConfig
from megaegpt.config.run import RunConfig
from megaegpt.config.training import ProfileConfig
from megaegpt.errors import DataError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.logging.profiling import StepProfiler
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import corpus, run_config

__all__ = ["corpus"]


def _traces(folder: Path) -> dict[str, set[str]]:
    return {
        path.name: {
            event["name"]
            for event in json.loads(path.read_text())["traceEvents"]
            if event["name"].startswith("step ")
        }
        for path in (folder / "profile").iterdir()
    }


def test_a_run_writes_the_trace_of_its_window_on_every_rank(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    profile = ProfileConfig(start=3, steps=2)
    config = run_config("gpt", corpus, tmp_path, logging={"profile": profile})
    shown, _ = distributed(2, _run, config)
    traces = _traces(Path(config.logging.directory))
    steps = {"step 3", "step 4"}
    assert traces == {f"steps_3-4_rank{rank}.json": steps for rank in (0, 1)}
    assert "profile of steps 3 to 4" in shown
    assert "aten::" in shown


def _run(config: RunConfig) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert pretrain(config, grid_for(1))
    return shown.getvalue()


def test_a_run_that_ends_inside_the_window_writes_what_it_has(tmp_path: Path) -> None:
    config = LoggingConfig(directory=str(tmp_path), profile=ProfileConfig(start=2, steps=9))
    said: list[str] = []
    with StepProfiler(config, ProcessGrid(), said.append) as profiler:
        for step in (1, 2, 3):
            profiler.enter(step)
            profiler.leave(step)
    assert _traces(tmp_path) == {"steps_2-3_rank0.json": {"step 2", "step 3"}}
    assert len(said) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    config = LoggingConfig(directory=str(tmp_path), profile=ProfileConfig(start=1, steps=1))
    with StepProfiler(config, ProcessGrid(), print) as profiler:
        profiler.enter(1)
        with pytest.raises(DataError, match="profile"):
            profiler.leave(1)
