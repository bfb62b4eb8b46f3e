"""What a run leaves to look at: ``metrics.jsonl``, boards and console lines, by rank 0."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaegpt.config import LoggingConfig, RunConfig
from megaegpt.files import write_whole
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.report.figures import can_draw, loss_by_chunk, pixels
from megaegpt.training.evaluation import Evaluation
from megaegpt.training.logging.loggers import Board, open_boards

METRICS = "metrics.jsonl"


class Monitor:
    """Records of a run; other ranks than 0 have one too, which does nothing.

    Args:
        config: where and what.
        grid: whether this is rank 0.
        done: optimizer steps the run starts from. Records of later steps, left by a run that was
            stopped after its last checkpoint, are dropped: their steps will be recorded again.

    Raises:
        ConfigError: a board cannot be opened.
    """

    def __init__(self, config: LoggingConfig, grid: ProcessGrid, done: int = 0) -> None:
        self._is_main = grid.is_main
        self._validated: dict[int, float] = {}
        self._boards: list[Board] = []
        self._told_of_images = False
        if not self._is_main:
            return
        folder = Path(config.directory)
        folder.mkdir(parents=True, exist_ok=True)
        kept = keep_records(folder / METRICS, done)
        self._validated |= {r["step"]: r["validation_loss"] for r in kept if "validation_loss" in r}
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._boards = open_boards(config, done)

    def say(self, text: str) -> None:
        """Show a line on the console."""
        if self._is_main:
            print(text, flush=True)

    def configuration(self, config: RunConfig) -> None:
        """Show what the run is."""
        for board in self._boards:
            board.configuration(config)

    def training(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record scalars of training step ``step`` (counted from 1), but None, inf and nan."""
        known = {
            name: value
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }
        self._record(step, known)
        self._scalars(step, {f"training/{name}": value for name, value in known.items()})

    def validation(self, step: int, result: Evaluation) -> None:
        """Record an evaluation after ``step`` steps, with a figure of the loss by chunk."""
        values = {
            "validation_loss": result.loss,
            "validation_nats_per_byte": result.nats_per_byte,
        }
        chunks = [loss for loss in result.loss_by_chunk if math.isfinite(loss)]
        self._validated[step] = result.loss
        self._record(step, {**values, **({"validation_loss_by_chunk": chunks} if chunks else {})})
        self._scalars(
            step,
            {
                "validation/loss": result.loss,
                "validation/nats_per_byte": result.nats_per_byte,
                **{f"validation_by_chunk/{n:02d}": loss for n, loss in enumerate(chunks)},
            },
        )
        if self._boards and chunks:
            self._draw_chunks(step, chunks)

    def _draw_chunks(self, step: int, losses: list[float]) -> None:
        if can_draw():
            image = pixels(loss_by_chunk({"validation": losses}))
            for board in self._boards:
                board.image(step, "validation/loss_by_chunk", image)
        elif not self._told_of_images:
            self._told_of_images = True
            self.say("notice: no image of the loss by chunk: matplotlib is not installed")

    def validation_loss(self, step: int) -> float | None:
        """The loss on record for an evaluation after ``step`` steps; on other ranks than 0 None."""
        return self._validated.get(step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, such as a generated sample."""
        for board in self._boards:
            board.text(step, name, text)

    def flush(self) -> None:
        """Make records so far readable by others."""
        if self._is_main:
            self._metrics.flush()
            for board in self._boards:
                board.flush()

    def close(self) -> None:
        """Write the rest."""
        if self._is_main:
            self._metrics.close()
            for board in self._boards:
                board.close()

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        if self._is_main:
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for board in self._boards:
            board.scalars(step, values)


def keep_records(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut ``metrics.jsonl`` down to whole records of the first ``step`` steps; returns them."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    records = {line: record for line in lines if (record := _parse(line)) is not None}
    kept = [line for line in lines if line in records and records[line]["step"] <= step]
    if kept != lines:
        write_whole(path, b"".join(kept))
    return [records[line] for line in kept]


def _parse(line: bytes) -> dict[str, Any] | None:
    """A record; None for a line that was cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and "step" in record
    return record if whole else None
