"""A run that was interrupted ends as if it had not been, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megaegpt.config import BatchRampConfig
from megaegpt.config.loading import config_to_yaml
from megaegpt.config.run import RunConfig
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, corpus, losses, records, run_config

__all__ = ["corpus"]

STEPS, STOPPED = 30, 15


def _config(
    kind: str,
    corpus: Path,
    folder: Path,
    tp_size: int,
    schedule: str = "cosine",
    sequence_parallel: bool = False,
    cp_size: int = 1,
    **training: object,
) -> RunConfig:
    return run_config(
        kind,
        corpus,
        folder,
        parallel={
            "tensor_parallel_size": tp_size,
            "sequence_parallel": sequence_parallel,
            "context_parallel_size": cp_size,
        },
        training={
            "steps": STEPS,
            "eval_interval": 15,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            **training,
        },
        optimizer={"schedule": schedule},
        checkpoint={"interval": 10},
        logging={"interval": 7},
    )


def _run(config: RunConfig, resume: bool = False, stop_after: int = STEPS) -> bool:
    grid = grid_for(config.parallel.tensor_parallel_size, config.parallel.context_parallel_size)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return pretrain(config, grid, resume=resume, stops=StopAfter(stop_after))


def _straight_and_interrupted(
    kind: str,
    corpus: Path,
    folder: Path,
    tp_size: int = 2,
    changes: dict[str, Any] | None = None,
) -> None:
    assert _run(_config(kind, corpus, folder / "straight", tp_size, **changes or {}))
    interrupted = _config(kind, corpus, folder / "interrupted", tp_size, **changes or {})
    assert not _run(interrupted, stop_after=STOPPED)
    assert _run(interrupted, resume=True)


def _assert_same_run(straight: Path, interrupted: Path) -> None:
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    assert losses(interrupted) == losses(straight)
    norms = [
        {r["step"]: r["grad_norm"] for r in records(f) if "loss" in r}
        for f in (straight, interrupted)
    ]
    assert norms[0] == norms[1]
    validation = [
        [r for r in records(folder) if "validation_loss" in r] for folder in (straight, interrupted)
    ]
    assert len(validation[0]) == 2
    assert validation[0] == validation[1]
    weights = Path("checkpoints") / f"step_{STEPS:08d}" / "weights" / "model.safetensors"
    assert (straight / weights).read_bytes() == (interrupted / weights).read_bytes()


@pytest.mark.parametrize("kind", [pytest.param("gpt", marks=pytest.mark.long), "egpt"])
def test_15_steps_and_15_resumed_are_30_at_tp_2_x_dp_2_with_dropout(
    corpus: Path, tmp_path: Path, kind: str, distributed: Distributed
) -> None:
    distributed(4, _straight_and_interrupted, kind, corpus, tmp_path)
    _assert_same_run(tmp_path / "straight", tmp_path / "interrupted")


@pytest.mark.long
def test_30_steps_with_sequence_parallelism_are_15_and_15_and_near_those_without(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """With dropout, and an EGPT's encoder cut in the same way."""
    changes = {"sequence_parallel": True, "micro_batch_size": 4}
    distributed(2, _straight_and_interrupted, "egpt", corpus, tmp_path, 2, changes)
    _assert_same_run(tmp_path / "straight", tmp_path / "interrupted")
    without = _config("egpt", corpus, tmp_path / "without", 2, micro_batch_size=4)
    distributed(2, _run, without)
    expected = losses(tmp_path / "without")
    assert losses(tmp_path / "straight") == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (4, 2)])
def test_30_steps_with_context_parallelism_are_15_and_15(
    corpus: Path, tmp_path: Path, distributed: Distributed, ranks: int, tp_size: int
) -> None:
    """With dropout, and evaluations in which every rank has windows of its own."""
    changes = {"cp_size": 2, "sequence_parallel": tp_size > 1}
    distributed(ranks, _straight_and_interrupted, "gpt", corpus, tmp_path, tp_size, changes)
    _assert_same_run(tmp_path / "straight", tmp_path / "interrupted")


def _resumed_on_other_ranks(
    distributed: Distributed, corpus: Path, folder: Path, before: int, after: int
) -> dict[int, float]:
    """Losses of a run without dropout, on so many context-parallel ranks, then on others."""

    def without_dropout(cp_size: int) -> RunConfig:
        config = _config("gpt", corpus, folder, 1, cp_size=cp_size)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))

    assert not any(distributed(before, _run, without_dropout(before), False, STOPPED))
    assert all(distributed(after, _run, without_dropout(after), True))
    return losses(folder)


@pytest.mark.long
def test_a_run_goes_on_with_context_parallelism_and_without(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    alone = _resumed_on_other_ranks(distributed, corpus, tmp_path / "1_1", 1, 1)
    evaluated = [r["validation_loss"] for r in records(tmp_path / "1_1") if "validation_loss" in r]
    for before, after in ((1, 2), (2, 1)):
        folder = tmp_path / f"{before}_{after}"
        found = _resumed_on_other_ranks(distributed, corpus, folder, before, after)
        assert found == pytest.approx(alone, rel=1e-4)
        assert [
            r["validation_loss"] for r in records(folder) if "validation_loss" in r
        ] == pytest.approx(evaluated, rel=1e-4)


def test_a_run_interrupted_while_its_batch_grows_goes_on_exactly_at_dp_2(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    ramp = BatchRampConfig(start=2, increment=2, steps=9)  # 2, 4 from step 9 on, 6 from step 18 on
    changes = {"global_batch_size": 6, "micro_batch_size": 1, "batch_ramp": ramp, "schedule": "wsd"}
    distributed(2, _straight_and_interrupted, "gpt", corpus, tmp_path, 1, changes)
    _assert_same_run(tmp_path / "straight", tmp_path / "interrupted")


def _resume_alone(config: RunConfig) -> bool:
    return _run(config, resume=True)


@pytest.mark.long
def test_a_run_killed_at_any_moment_goes_on_from_its_last_complete_checkpoint(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    root = Path(__file__).parents[2]
    straight = _config("gpt", corpus, tmp_path / "straight", 1)
    killed = _config("gpt", corpus, tmp_path / "killed", 1)
    distributed(1, _resume_alone, straight)
    (tmp_path / "killed.yaml").write_text(config_to_yaml(killed))
    program = [sys.executable, "launchers/pretrain.py", "--config", str(tmp_path / "killed.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        program, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    latest = tmp_path / "killed" / "checkpoints" / "latest"
    while not latest.exists():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.005)
    time.sleep(random.random())
    process.kill()
    process.communicate()
    assert distributed(1, _resume_alone, killed) == [True]
    _assert_same_run(tmp_path / "straight", tmp_path / "killed")


def _resume_what_is_complete(corpus: Path, folder: Path) -> list[str]:
    config = run_config("gpt", corpus, folder)
    shown = []
    for changes in ({}, {"optimizer": {"lr": 1e-3}}, {}):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
            again = run_config("gpt", corpus, folder, **changes) if shown else config
            assert pretrain(again, grid_for(1), resume=True)
        shown.append(text.getvalue())
        files = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in _files(folder)}
        shown.append(str(hash(tuple(files.items()))))
    (folder / "metrics.jsonl").write_text("")  # as if it had died before its last evaluation
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
        pretrain(config, grid_for(1), resume=True)
    return [*shown, text.getvalue()]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_complete_run_says_so_on_resuming_and_stays_as_it_is(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _resume_what_is_complete, corpus, tmp_path)
    _, first, changed, second, complete, third, evaluated = shown
    assert first == second == third
    latest = tmp_path / "checkpoints" / "step_00000006"
    told = f"complete: {latest} is after step 6 of 6; raise training.steps to train on\n"
    assert complete == told
    assert changed.endswith(told)
    assert "optimizer.lr 0.003 -> 0.001" in changed
    assert "step 6: validation loss" in evaluated
