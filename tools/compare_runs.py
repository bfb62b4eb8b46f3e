"""Tabulate the latest validation losses of several runs, for EGPT and DeepGPT also by chunk.

    python tools/compare_runs.py runs/encoder runs/deepgpt runs/egpt

A run is the folder named by its logging.directory. Losses compare only between runs on the same
validation text; nats per byte compare between tokenizers too.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from megaegpt.config import RunConfig
from megaegpt.config.loading import load_config
from megaegpt.errors import DataError, exits_cleanly


@dataclass(frozen=True)
class Result:
    """The latest evaluation of a run."""

    name: str
    config: RunConfig
    step: int
    loss: float
    """Nats per token."""
    nats_per_byte: float
    by_chunk: tuple[float, ...]
    """Nats per token by chunk of the window; empty for a gpt."""


@exits_cleanly
def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    print(compare([read_result(run) for run in parser.parse_args().runs]))


def read_result(run: Path) -> Result:
    """The last validation in a run's ``metrics.jsonl``.

    Raises:
        DataError: the folder holds no run, or one that was not evaluated yet.
        ConfigError: its ``config.yaml`` cannot be read.
    """
    config = load_config(run / "config.yaml")
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{run}: no metrics.jsonl of a run ({error.strerror})") from None
    try:
        records = [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{run}/metrics.jsonl is damaged: {error}") from None
    record = next((r for r in reversed(records) if "validation_loss" in r), None)
    if record is None:
        raise DataError(
            f"{run} was not evaluated yet: is data.validation set, and the run complete?"
        )
    return Result(
        name=run.name,
        config=config,
        step=record["step"],
        loss=record["validation_loss"],
        nats_per_byte=record["validation_nats_per_byte"],
        by_chunk=tuple(record.get("validation_loss_by_chunk", ())),
    )


def compare(results: list[Result]) -> str:
    """The tables as text."""
    rows = [["run", "model", "steps", "tokens seen", "nats/token", "nats/byte", "perplexity"]]
    for result in results:
        rows.append(
            [
                result.name,
                result.config.model.kind,
                f"{result.step:,}",
                f"{result.config.tokens_before(result.step):,}",
                f"{result.loss:.4f}",
                f"{result.nats_per_byte:.4f}",
                f"{math.exp(min(result.loss, 700.0)):.1f}",
            ]
        )
    tables = [aligned(rows)]
    chunked = [result for result in results if result.by_chunk]
    if chunked:
        numbers = [str(number) for number in range(max(len(r.by_chunk) for r in chunked))]
        lines = [[r.name, *(f"{loss:.3f}" for loss in r.by_chunk)] for r in chunked]
        tables.append("nats/token by chunk of the window (= earlier chunks there are)")
        tables.append(aligned([["chunk", *numbers], *lines]))
    return "\n".join(tables)


def aligned(rows: list[list[str]]) -> str:
    """Rows, the first of them the heading, as a table: numbers to the right, names to the left."""
    longest = max(len(row) for row in rows)
    padded = [row + [""] * (longest - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    left = [any(c.isalpha() for c in column[-1]) for column in zip(*padded, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in padded
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(f"  {line}" for line in lines) + "\n"


if __name__ == "__main__":
    main()
