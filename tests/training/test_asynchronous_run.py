"""Whole runs whose checkpoints are written beside training, and the same runs that wait."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from megaegpt.config.run import RunConfig
from megaegpt.errors import TrainingError
from megaegpt.model.calling import SequenceInputs
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, corpus, losses, run_config

__all__ = ["corpus"]


def _config(corpus: Path, folder: Path, asynchronous: bool) -> RunConfig:
    return run_config(
        "gpt",
        corpus,
        folder,
        parallel={"zero_stage": 1},
        checkpoint={"asynchronous": asynchronous, "interval": 2, "keep": 9, "keep_best": True},
    )


def _run(config: RunConfig, resume: bool = False, stop_after: int = 99) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        pretrain(config, grid_for(1), resume=resume, stops=StopAfter(stop_after))
    return shown.getvalue()


def _run_both_ways(corpus: Path, folder: Path) -> str:
    _run(_config(corpus, folder / "waiting", False))
    beside = _config(corpus, folder / "beside", True)
    return _run(beside, stop_after=3) + _run(beside, resume=True)


def test_checkpoints_written_beside_training_are_those_of_a_run_that_waits(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """The run beside is stopped after step 3, saved there, and resumed."""
    shown = distributed(2, _run_both_ways, corpus, tmp_path)[0]
    waiting, beside = tmp_path / "waiting", tmp_path / "beside"
    assert losses(beside) == losses(waiting)
    for step in (2, 3, 4, 6):
        folder = f"step_{step:08d}"
        assert f"saved {beside / 'checkpoints' / folder} in " in shown
        ours = Manifest.read(beside / "checkpoints" / folder).files
        theirs = Manifest.read(waiting / "checkpoints" / folder).files
        states = {name for name in theirs if not name.endswith("config.json")}
        assert {n: ours[n].sha256 for n in states} == {n: theirs[n].sha256 for n in states}, step
    for name in ("latest", "best"):
        assert (beside / "checkpoints" / name).exists()
    stopped = shown.index("stopped by the test after step 3")
    assert shown.index("step_00000003 in ") < stopped
    assert shown.count("training waited") == 4


def _meet_a_bad_loss(corpus: Path, folder: Path) -> str:
    """What a run says that ends in the step after a save began."""
    original = SequenceInputs.loss
    calls = 0

    def bad(self: SequenceInputs, model: object, batch: object, reduction: str = "sum") -> object:
        nonlocal calls
        calls += 1
        nats = original(self, model, batch, reduction)  # type: ignore[arg-type]
        return nats * float("inf") if calls > 2 * 4 else nats

    SequenceInputs.loss = bad  # type: ignore[method-assign,assignment]
    try:
        _run(_config(corpus, folder, True))
    except TrainingError as error:
        return str(error)
    finally:
        SequenceInputs.loss = original  # type: ignore[method-assign]
    raise AssertionError("the run went on")


@pytest.mark.long
def test_an_error_on_all_ranks_waits_for_what_was_being_written(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (message,) = distributed(1, _meet_a_bad_loss, corpus, tmp_path)
    assert message.startswith("step 3: the loss is not finite")
    assert "--resume goes back to" in message
    assert "step_00000002" in message
