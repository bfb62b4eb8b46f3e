"""Ending when the validation loss no longer improves, and keeping the best checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.evaluation.text_loss import Evaluation, Evaluator
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.logging.best import BestLoss
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, corpus, losses, run_config, validation_losses

__all__ = ["corpus"]

SCRIPT = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.2}
"""Validation loss by step: with a patience of 2 the run ends after step 4."""


def test_patience_counts_evaluations_since_the_best() -> None:
    best = BestLoss()
    assert not best.lost_patience(1)
    for step, loss in SCRIPT.items():
        best.count(step, loss)
        best.count(step, 0.0)  # counted already
    assert (best.loss, best.step, best.without) == (2.0, 2, 2)
    assert best.lost_patience(2)
    assert not best.lost_patience(3)
    assert not best.lost_patience(None)
    assert BestLoss.restored(best.state()) == best
    best.count(5, float("nan"))
    assert (best.loss, best.without) == (2.0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best_and_no_obstacle(bad: float) -> None:
    best = BestLoss()
    best.count(1, bad)
    assert (best.loss, best.step, best.without) == (None, 0, 1)
    assert best.lost_patience(1)
    best.count(2, 3.0)
    assert (best.loss, best.step, best.without) == (3.0, 2, 0)
    # As earlier versions saved it.
    from_before = BestLoss.restored({"loss": bad, "step": 1, "counted": 1, "without": 0})
    from_before.count(2, 3.0)
    assert (from_before.loss, from_before.step) == (3.0, 2)


@pytest.mark.parametrize("state", ["2.0", {"loss": "2.0"}, {"step": None}, {"patience": 1}])
def test_a_best_loss_of_another_form_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match="the checkpoint's best loss is damaged: "):
        BestLoss.restored(state)


@contextlib.contextmanager
def _scripted() -> Iterator[None]:
    """Evaluations give the losses of the script, from the step after the last one on record."""
    original = Evaluator.evaluate

    def evaluate(self: Evaluator, model: Any, *_: Any) -> Evaluation:
        return Evaluation(loss=next(_script), nats_per_byte=1.0, tokens=1)

    Evaluator.evaluate = evaluate  # type: ignore[method-assign]
    try:
        yield
    finally:
        Evaluator.evaluate = original  # type: ignore[method-assign]


_script: Iterator[float] = iter(())


def _run(corpus: Path, folder: Path, first: int, resume: bool = False, stop: int = 99) -> str:
    global _script
    _script = iter([loss for step, loss in SCRIPT.items() if step >= first])
    config = run_config(
        "gpt",
        corpus,
        folder,
        training={"steps": 9, "eval_interval": 1, "patience": 2},
        checkpoint={"interval": 3, "keep": 1, "keep_best": True},
    )
    shown = io.StringIO()
    with _scripted(), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        complete = pretrain(config, grid_for(1), resume=resume, stops=StopAfter(stop))
    assert complete == (stop == 99)
    return shown.getvalue()


def _run_to_the_end(corpus: Path, folder: Path) -> list[str]:
    straight = _run(corpus, folder / "straight", 1)
    _run(corpus, folder / "stopped", 1, stop=3)
    resumed = _run(corpus, folder / "stopped", 4, resume=True)
    again = _run(corpus, folder / "stopped", 5, resume=True)
    return [straight, resumed, again]


def test_a_run_ends_without_patience_resumed_or_not_and_keeps_the_best_at_dp_2(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    shown, _ = distributed(2, _run_to_the_end, corpus, tmp_path)
    for text in shown:
        assert (
            "ended after step 4 of 9: no validation loss better than 2.0000, that of step 2" in text
        )
    for folder in (tmp_path / "straight", tmp_path / "stopped"):
        assert validation_losses(folder) == SCRIPT
        checkpoints = folder / "checkpoints"
        kept = ["best", "latest", "step_00000002", "step_00000004"]
        assert sorted(p.name for p in checkpoints.iterdir()) == kept
        assert os.readlink(checkpoints / "best") == "step_00000002"
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def _never_finite(corpus: Path, folder: Path) -> str:
    global _script
    _script = itertools.repeat(math.nan)
    training = {"steps": 9, "eval_interval": 1, "patience": 2, "on_nonfinite": "skip"}
    shown = io.StringIO()
    with _scripted(), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        assert pretrain(run_config("gpt", corpus, folder, training=training), grid_for(1))
    return shown.getvalue()


def test_losses_that_are_not_finite_are_evaluations_without_a_better_one(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _never_finite, corpus, tmp_path)
    assert "ended after step 2 of 9: no validation loss was finite in 2 evaluations" in shown


def _go_on_after_the_end(corpus: Path, folder: Path) -> None:
    """The last step is evaluated whatever the interval, after it was saved."""
    global _script
    _script = iter([3.0, 2.0, 2.5, 2.6])
    for steps, resume in ((3, False), (6, True)):
        config = run_config(
            "gpt",
            corpus,
            folder,
            training={"steps": steps, "eval_interval": 2},
            checkpoint={"interval": 3, "keep": 1, "keep_best": True},
        )
        with _scripted(), contextlib.redirect_stdout(io.StringIO()):
            assert pretrain(config, grid_for(1), resume=resume)


def test_a_run_with_more_steps_knows_the_best_that_its_checkpoint_does_not(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    distributed(1, _go_on_after_the_end, corpus, tmp_path)
    assert validation_losses(tmp_path) == {2: 3.0, 3: 2.0, 4: 2.5, 6: 2.6}
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_00000003"


def _go_on_by_another_set(corpus: Path, folder: Path) -> str:
    global _script
    _script = iter([1.0, 1.0, *[9.0, 2.0], *[9.0, 3.0], *[9.0, 3.0]])  # validation, the other
    first = run_config(
        "gpt",
        corpus,
        folder,
        training={"steps": 9, "eval_interval": 1, "patience": 2},
        checkpoint={"interval": 1, "keep_best": True},
    )
    data = dataclasses.replace(first.data, validation_sets=(f"other={corpus}/train",))
    judging = dataclasses.replace(first.checkpoint, best_of="other")
    other = dataclasses.replace(first, data=data, checkpoint=judging)
    shown = io.StringIO()
    with _scripted(), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        pretrain(first, grid_for(1), stops=StopAfter(2))
        pretrain(other, grid_for(1), resume=True)
    return shown.getvalue()


def test_an_evaluation_made_on_resuming_counts_where_the_best_is_sought_anew(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _go_on_by_another_set, corpus, tmp_path)
    assert "notice: the best is sought anew" in shown
    assert "ended after step 4 of 9: no validation loss better than 2.0000, that of step 2" in shown
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_00000002"


def _die_before_the_best_is_marked(corpus: Path, folder: Path) -> None:
    original = CheckpointManager.mark_best

    def dies(self: CheckpointManager, step: int, grid: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt
        original(self, step, grid)

    CheckpointManager.mark_best = dies  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            _run(corpus, folder, 1)
    finally:
        CheckpointManager.mark_best = original  # type: ignore[method-assign]
    assert os.readlink(folder / "checkpoints" / "best") == "step_00000001"
    _run(corpus, folder, 3, resume=True)


def test_a_best_that_was_saved_but_not_marked_is_marked_on_resuming(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    distributed(1, _die_before_the_best_is_marked, corpus, tmp_path)
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_00000002"
    assert validation_losses(tmp_path) == SCRIPT


def _nothing_held_out(corpus: Path, folder: Path) -> str:
    config = run_config(
        "gpt", corpus, folder, data={"validation": ()}, checkpoint={"keep_best": True}
    )
    with pytest.raises(ConfigError) as caught:
        pretrain(config, grid_for(1))
    return str(caught.value)


def test_the_best_of_nothing_is_refused(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (message,) = distributed(1, _nothing_held_out, corpus, tmp_path)
    assert "checkpoint.keep_best=true needs data.validation" in message
