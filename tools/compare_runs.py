"""Tabulate the latest validation losses of several runs, for EGPT and DeepGPT also by chunk.

    python tools/compare_runs.py runs/encoder runs/deepgpt runs/egpt

A run is the folder named by its logging.directory. Losses compare only between runs on the same
validation text; nats per byte compare between tokenizers too.
"""

from __future__ import annotations

import argparse
import math

from megaegpt.arguments import ArgumentParser, path
from megaegpt.errors import DataError, exits_cleanly
from megaegpt.report.runs import Run, read_runs
from megaegpt.text_tables import format_table


@exits_cleanly
def main() -> None:
    """Print the tables."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="folder of a run")
    print(compare(read_runs(parser.parse_args().runs)))


def compare(runs: list[Run]) -> str:
    """The tables as text.

    Raises:
        DataError: no run was evaluated yet.
    """
    found = {run.name: run.last_validation() for run in runs}
    evaluations = {name: record for name, record in found.items() if record is not None}
    if not evaluations:
        raise DataError(
            f"{', '.join(found)} was not evaluated yet: is data.validation set, and did the run "
            "reach its first evaluation?"
        )
    rows = [["run", "model", "steps", "tokens seen", "nats/token", "nats/byte", "perplexity"]]
    for run in runs:
        record = evaluations.get(run.name)
        if record is None:  # a run that began lately, or that diverged early
            rows.append([run.name, run.config.model.kind, *["-"] * (len(rows[0]) - 2)])
            continue
        step, loss = record["step"], record["validation_loss"]
        per_byte = record.get("validation_nats_per_byte")
        rows.append(
            [
                run.name,
                run.config.model.kind,
                f"{step:,}",
                f"{run.tokens_before(step):,}",
                f"{loss:.4f}",
                f"{per_byte:.4f}" if per_byte is not None else "-",
                f"{math.exp(min(loss, 700.0)):.1f}",
            ]
        )
    tables = [format_table(rows, names=2), ""]
    by_chunk = {
        name: record["validation_loss_by_chunk"]
        for name, record in evaluations.items()
        if "validation_loss_by_chunk" in record
    }
    if by_chunk:
        numbers = [str(number) for number in range(max(map(len, by_chunk.values())))]
        lines = [[name, *(f"{loss:.3f}" for loss in losses)] for name, losses in by_chunk.items()]
        tables.append("nats/token by chunk of the window (= earlier chunks there are)")
        tables.append(format_table([["chunk", *numbers], *lines]))
    return "\n".join(tables).rstrip()


if __name__ == "__main__":
    main()
