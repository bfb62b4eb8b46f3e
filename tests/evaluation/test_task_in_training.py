"""Tasks are scored during training, on all ranks, and change nothing of it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config.run import RunConfig
from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import Scorer
from megaegpt.evaluation.task_in_training import TaskInTraining
from megaegpt.evaluation.tasks import (
    TaskResult,
    read_hellaswag,
    read_lambada,
    score_hellaswag,
    score_lambada,
)
from megaegpt.generation.trained import load_for_inference
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.evaluation.test_tasks import HELLASWAG, PASSAGES, write
from tests.tiny.runs import StopAfter, corpus, encoder_config, losses, records, run_config

__all__ = ["corpus"]

VOCAB = 50257


@pytest.fixture(scope="module")
def tasks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each form, and an encoder that knows all tokens of the tokenizer."""
    folder = tmp_path_factory.mktemp("tasks")
    write(folder / "words.jsonl", [{"text": text} for text in PASSAGES])
    write(folder / "endings.jsonl", HELLASWAG)
    grid = ProcessGrid()
    save_weights(build_model(encoder_config(vocab_size=VOCAB), grid, seed=7), folder / "gpt", grid)
    return folder


def _config(kind: str, corpus: Path, tasks: Path, folder: Path, tp: int = 1) -> RunConfig:
    model: dict[str, Any] = {"vocab_size": VOCAB}
    if kind == "egpt":
        encoder = run_config(kind, corpus, folder).model.encoder
        model["encoder"] = type(encoder)(source=str(tasks / "gpt"), batch_size=4)
    return run_config(
        kind,
        corpus,
        folder,
        model=model,
        data={"tasks": (f"words={tasks}/words.jsonl", f"endings={tasks}/endings.jsonl")},
        training={"steps": 4, "eval_interval": 2},
        checkpoint={"interval": 0, "keep_best": True, "best_of": "endings"},
        parallel={"tensor_parallel_size": tp},
    )


def _without(config: RunConfig, folder: Path) -> RunConfig:
    """The same run without tasks."""
    return replace(
        config,
        data=replace(config.data, tasks=()),
        checkpoint=replace(
            config.checkpoint, directory=str(folder / "checkpoints"), best_of="validation"
        ),
        logging=replace(config.logging, directory=str(folder)),
    )


def _three_runs(kind: str, corpus: Path, tasks: Path, folder: Path) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        config = _config(kind, corpus, tasks, folder / "straight")
        pretrain(config, grid_for(1))
        pretrain(_without(config, folder / "without"), grid_for(1))
        stopped = _config(kind, corpus, tasks, folder / "stopped")
        pretrain(stopped, grid_for(1), stops=StopAfter(3))
        pretrain(stopped, grid_for(1), resume=True)
    return shown.getvalue()


def _measures(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for record in records(folder):
        for key, value in record.items():
            if key.startswith("task_"):
                found.setdefault(key, {})[record["step"]] = value
    return found


@pytest.mark.parametrize("kind", ["gpt", pytest.param("egpt", marks=pytest.mark.long)])
def test_tasks_are_recorded_by_name_and_leave_training_as_it_is(
    corpus: Path, tasks: Path, tmp_path: Path, kind: str, distributed: Distributed
) -> None:
    shown, _ = distributed(2, _three_runs, kind, corpus, tasks, tmp_path)
    assert "step 2: words: accuracy 0." in shown
    found = _measures(tmp_path / "straight")
    assert set(found["task_perplexity/words"]) == set(found["task_accuracy_norm/endings"]) == {2, 4}
    assert _measures(tmp_path / "stopped") == found
    assert losses(tmp_path / "straight") == losses(tmp_path / "without")

    errors = found["task_error/endings"]
    best = min(errors, key=lambda step: errors[step])
    for name in ("straight", "stopped"):
        link = tmp_path / name / "checkpoints" / "best"
        assert link.resolve().name == f"step_{best:08d}"

    trained = load_for_inference(tmp_path / "straight", ProcessGrid())
    scorer = Scorer(trained, ProcessGrid(), 3, torch.float32)
    words = score_lambada(scorer, read_lambada(tasks / "words.jsonl"), None)
    endings = score_hellaswag(scorer, read_hellaswag(tasks / "endings.jsonl"), None)
    assert found["task_accuracy/words"][4] == words.accuracy
    assert found["task_perplexity/words"][4] == pytest.approx(words.perplexity, rel=1e-5)
    assert errors[4] == 1 - endings.accuracy_norm


def _one_run(corpus: Path, tasks: Path, folder: Path, tp: int) -> None:
    config = _config("gpt", corpus, tasks, folder, tp)
    pretrain(replace(config, model=replace(config.model, dropout=0.0)), grid_for(tp))


@pytest.mark.long
def test_a_model_cut_over_ranks_scores_alike(
    corpus: Path, tasks: Path, tmp_path: Path, distributed: Distributed
) -> None:
    for ranks in (1, 2):
        distributed(ranks, _one_run, corpus, tasks, tmp_path / str(ranks), ranks)
    whole, cut = (_measures(tmp_path / str(ranks)) for ranks in (1, 2))
    assert whole.keys() == cut.keys()
    for key, values in whole.items():
        assert list(cut[key].values()) == pytest.approx(list(values.values()), rel=1e-4)


def _twice(corpus: Path, tasks: Path, folder: Path) -> None:
    config = _config("gpt", corpus, tasks, folder)
    config = replace(
        config,
        data=replace(config.data, validation=()),
        checkpoint=replace(config.checkpoint, keep_best=False, best_of="validation", interval=2),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, grid_for(1), stops=StopAfter(2))
        pretrain(config, grid_for(1), resume=True)


def test_a_run_without_validation_does_not_score_its_tasks_again_when_it_goes_on(
    corpus: Path, tasks: Path, tmp_path: Path, distributed: Distributed
) -> None:
    distributed(1, _twice, corpus, tasks, tmp_path)
    steps = [r["step"] for r in records(tmp_path) if "task_error/words" in r]
    assert steps == [2, 4]


def _stop_in_tasks(corpus: Path, tasks: Path, folder: Path) -> tuple[bool, str]:
    config, shown = _config("gpt", corpus, tasks, folder), io.StringIO()
    original = TaskInTraining.evaluate

    def with_signal(self: TaskInTraining, why_end: Callable[[], str | None]) -> TaskResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, why_end)

    with contextlib.redirect_stdout(shown):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TaskInTraining, "evaluate", with_signal)
            complete = pretrain(config, grid_for(1))
        pretrain(config, grid_for(1), resume=True)
    return complete, shown.getvalue()


def test_a_signal_in_tasks_leaves_the_evaluation_for_the_next_start(
    corpus: Path, tasks: Path, tmp_path: Path, distributed: Distributed
) -> None:
    results = distributed(2, _stop_in_tasks, corpus, tasks, tmp_path)
    assert not any(complete for complete, _ in results)
    assert "step 2: the evaluation was left for SIGTERM" in results[0][1]
    assert {*_measures(tmp_path)["task_error/words"]} == {2, 4}
    recorded = [r["step"] for r in records(tmp_path) if "validation_loss" in r]
    assert recorded == [2, 4]


def _refuses(corpus: Path, entry: str, vocab_size: int, message: str, folder: Path) -> None:
    changes: dict[str, Any] = {"model": {"vocab_size": vocab_size}, "data": {"tasks": (entry,)}}
    with pytest.raises(DataError, match=message):
        pretrain(run_config("gpt", corpus, folder, **changes), grid_for(1))


def test_a_task_that_cannot_be_scored_ends_the_run_before_its_first_step(
    corpus: Path, tasks: Path, tmp_path: Path, distributed: Distributed
) -> None:
    write(tmp_path / "bad.jsonl", [{"txt": "a"}])
    write(tmp_path / "long.jsonl", [{"text": f"one {'xq' * 20}"}])
    for file, vocab_size, message in (
        (tmp_path / "missing.jsonl", VOCAB, "missing.jsonl"),
        (tmp_path / "bad.jsonl", VOCAB, "bad.jsonl, line 1: needs text"),
        (tmp_path / "long.jsonl", VOCAB, "task mine .*pair 0: .* the model sees 8"),
        (tasks / "words.jsonl", 100, "task mine .*it has another tokenizer"),
    ):
        run = tmp_path / "run"
        distributed(1, _refuses, corpus, f"mine={file}", vocab_size, message, run)
        assert not (run / "metrics.jsonl").exists()
