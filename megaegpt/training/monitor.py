"""What a run leaves to look at: ``metrics.jsonl``, TensorBoard and console lines, by rank 0."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaegpt.config import LoggingConfig
from megaegpt.data.files import write_whole
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.evaluation import Evaluation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"


class Monitor:
    """Records of a run; other ranks than 0 have one too, which does nothing.

    Args:
        config: where and what.
        grid: whether this is rank 0.
        done: optimizer steps the run starts from. Records of later steps, left by a run that was
            stopped after its last checkpoint, are dropped: their steps will be recorded again.
    """

    def __init__(self, config: LoggingConfig, grid: ProcessGrid, done: int = 0) -> None:
        self._is_main = grid.is_main
        self._validated: dict[int, float] = {}
        self._board: SummaryWriter | None = None
        if not self._is_main:
            return
        folder = Path(config.directory)
        folder.mkdir(parents=True, exist_ok=True)
        kept = keep_records(folder / METRICS, done)
        self._validated |= {r["step"]: r["validation_loss"] for r in kept if "validation_loss" in r}
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def say(self, text: str) -> None:
        """Show a line on the console."""
        if self._is_main:
            print(text, flush=True)

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
        if self._board is not None and chunks and importlib.util.find_spec("matplotlib"):
            self._board.add_figure("validation/loss_by_chunk", _chunk_figure(chunks), step)

    def validation_loss(self, step: int) -> float | None:
        """The loss on record for an evaluation after ``step`` steps; on other ranks than 0 None."""
        return self._validated.get(step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Show a text, such as the configuration or a generated sample, in TensorBoard."""
        if self._board is not None:
            fenced = "\n".join("    " + line for line in text.splitlines())
            self._board.add_text(name, fenced, step)

    def flush(self) -> None:
        """Make records so far readable by others."""
        if self._is_main:
            self._metrics.flush()
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Write the rest."""
        if self._is_main:
            self._metrics.close()
            if self._board is not None:
                self._board.close()

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        if self._is_main:
            self._metrics.write(json.dumps({"step": step, **values}) + "\n")

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


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


def _chunk_figure(losses: list[float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(
        xlabel="chunk of the window (earlier chunks seen)", ylabel="validation loss, nats per token"
    )
    axes.plot(range(len(losses)), losses, marker="o")
    axes.grid(alpha=0.3)
    return figure
