"""The records of a run, by rank 0: ``metrics.jsonl``, TensorBoard or W&B, and console lines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaegpt.config import LoggingConfig, RunConfig
from megaegpt.errors import DataError
from megaegpt.evaluation.tasks import TaskResult
from megaegpt.evaluation.text_loss import Evaluation
from megaegpt.files import is_special, naming_failures, write_whole
from megaegpt.json_files import conform
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.report.figures import can_draw, loss_by_chunk, pixels
from megaegpt.training.logging.loggers import Logger, open_loggers

METRICS = "metrics.jsonl"


class Monitor:
    """Records of a run; other ranks than 0 have one too, which does nothing.

    Args:
        config: where and what.
        grid: whether this is rank 0.
        done: optimizer steps the run starts from. Records of later steps, left by a run that was
            stopped after its last checkpoint, are dropped: their steps will be recorded again.
        judged: the validation set that :meth:`judged_value` tells of, or the task.
        tasks: names of the tasks.

    Raises:
        ConfigError: a logger cannot be opened.
        DataError: the folder cannot be written, or a loss on record is no number; the methods raise
            it too, of a full disk.
    """

    def __init__(
        self,
        config: LoggingConfig,
        grid: ProcessGrid,
        done: int = 0,
        judged: str = "validation",
        tasks: Container[str] = (),
    ) -> None:
        self._is_main = grid.is_main
        self._judged = _task_key(judged, "error") if judged in tasks else _loss_key(judged)
        self._validated: dict[int, float] = {}
        self._loggers: list[Logger] = []
        self._told_of_images = False
        self._folder = folder = Path(config.directory)
        if not self._is_main:
            return
        with naming_failures(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = keep_records(folder / METRICS, done)
        self._validated |= {
            record["step"]: _validation_loss(record, self._judged, folder / METRICS)
            for record in kept
            if self._judged in record
        }
        with naming_failures(folder):
            self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
            self._loggers = open_loggers(config, done)

    def log(self, text: str) -> None:
        """Show a line on the console."""
        if self._is_main:
            print(text, flush=True)

    def configuration(self, config: RunConfig) -> None:
        """Show the run's configuration in every logger."""
        self._show(lambda logger: logger.configuration(config))

    def training(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record scalars of training step ``step`` (counted from 1) that are known (not None)."""
        known = {name: value for name, value in values.items() if value is not None}
        self._record(step, known)
        self._scalars(step, {f"training/{name}": value for name, value in known.items()})

    def validation(self, step: int, result: Evaluation, name: str = "validation") -> None:
        """Record an evaluation after ``step`` steps of the validation set ``name``.

        ``validation`` itself has a figure of the loss by chunk.
        """
        if _loss_key(name) == self._judged:
            self._validated[step] = result.loss
        further = "" if name == "validation" else f"/{name}"
        values: dict[str, Any] = {
            _loss_key(name): result.loss,
            f"validation_nats_per_byte{further}": result.nats_per_byte,
        }
        scalars = {
            f"validation{further}/loss": result.loss,
            f"validation{further}/nats_per_byte": result.nats_per_byte,
        }
        chunks = [] if further else list(result.loss_by_chunk[: _with_targets(result)])
        if chunks:
            values["validation_loss_by_chunk"] = chunks
            scalars |= {f"validation_by_chunk/{n:02d}": loss for n, loss in enumerate(chunks)}
        self._record(step, values)
        self._scalars(step, scalars)
        if self._loggers and chunks:
            self._draw_chunks(step, chunks)

    def task(self, step: int, result: TaskResult, name: str) -> None:
        """Record the measures of the task ``name`` after ``step`` steps."""
        measures = {**asdict(result), "error": result.error}
        if _task_key(name, "error") == self._judged:
            self._validated[step] = result.error
        self._record(step, {_task_key(name, key): value for key, value in measures.items()})
        self._scalars(step, {f"tasks/{name}/{key}": value for key, value in measures.items()})

    def _draw_chunks(self, step: int, losses: list[float]) -> None:
        if can_draw():
            image = pixels(loss_by_chunk({"validation": losses}))
            self._show(lambda logger: logger.image(step, "validation/loss_by_chunk", image))
        elif not self._told_of_images:
            self._told_of_images = True
            self.log("notice: no image of the loss by chunk: matplotlib is not installed")

    def judged_value(self, step: int) -> float | None:
        """What is on record for an evaluation after ``step`` steps, of what is judged by: a set's
        loss or a task's share of wrong answers; on other ranks than 0 None.
        """
        return self._validated.get(step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, such as a generated sample."""
        self._show(lambda logger: logger.text(step, name, text))

    def flush(self) -> None:
        """Make records so far readable by others."""
        if self._is_main:
            with naming_failures(self._folder / METRICS):
                self._metrics.flush()
            self._show(lambda logger: logger.flush())

    def close(self) -> None:
        """Write the rest."""
        if self._is_main:
            with naming_failures(self._folder / METRICS):
                self._metrics.close()
            self._show(lambda logger: logger.close())

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        if self._is_main:
            record = {"step": step, **{name: _or_null(value) for name, value in values.items()}}
            with naming_failures(self._folder / METRICS):
                self._metrics.write(json.dumps(record, allow_nan=False) + "\n")

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        finite = {n: value for n, value in values.items() if _or_null(value) is not None}
        self._show(lambda logger: logger.scalars(step, finite))

    def _show(self, act: Callable[[Logger], None]) -> None:
        with naming_failures(self._folder):  # of a full disk, the writer's thread tells here
            for logger in self._loggers:
                act(logger)


def _with_targets(result: Evaluation) -> int:
    """How many chunks of the window have a loss: those at its end may be without targets."""
    known = [number for number, loss in enumerate(result.loss_by_chunk, 1) if not math.isnan(loss)]
    return max(known, default=0)


def _or_null(value: Any) -> Any:
    """JSON has no number for what is not finite: a loss of inf or nan is on record as null."""
    if isinstance(value, list):
        return [_or_null(item) for item in value]
    return value if value is not None and math.isfinite(value) else None


def keep_records(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut ``metrics.jsonl`` down to whole records of the first ``step`` steps; returns them."""
    if is_special(path):
        raise DataError(f"{path} is no regular file: remove it")
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    records = {line: record for line in lines if (record := _parse(line)) is not None}
    kept = [line for line in lines if line in records and records[line]["step"] <= step]
    if kept != lines:
        write_whole(path, b"".join(kept))
    return [records[line] for line in kept]


def _loss_key(name: str) -> str:
    """The name in ``metrics.jsonl`` of a validation set's loss."""
    return "validation_loss" if name == "validation" else f"validation_loss/{name}"


def _task_key(name: str, measure: str) -> str:
    """The name in ``metrics.jsonl`` of a task's measure."""
    return f"task_{measure}/{name}"


def _validation_loss(record: dict[str, Any], key: str, path: Path) -> float:
    """The loss of an evaluation on record; nan if it was not finite, which earlier versions wrote
    as NaN.
    """
    loss = record[key]
    if loss is None or (isinstance(loss, float) and not math.isfinite(loss)):
        return math.nan
    where = f"{path}, the evaluation after step {record['step']},"
    found = conform({key: loss}, dict[str, float], where, remedy="delete its line")
    return found[key]


def has_evaluation(folder: Path, step: int) -> bool:
    """Whether a run's folder has a record of an evaluation after ``step`` steps."""
    path = folder / METRICS
    if not path.is_file():
        return False
    with path.open("rb") as lines:
        records = (_parse(line) for line in lines)
        return any(r is not None and r["step"] == step and _is_evaluation(r) for r in records)


def _is_evaluation(record: dict[str, Any]) -> bool:
    return any(key.startswith(("validation_loss", "task_error/")) for key in record)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record; None for a line that was cut off."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict)
    return record if whole and type(record.get("step")) is int else None
