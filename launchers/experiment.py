"""Ask whether EGPT uses its context: train its variants over an encoder, measure and report.

    python launchers/experiment.py --config configs/experiments/smoke.yaml

It prepares the texts, pretrains the encoder, trains every variant with every seed, measures on text
that was held out, and writes the report.

One process, on the GPU if there is one. What is finished is not done again: after an interruption
(Ctrl-C and SIGTERM save first) the same command goes on, wherever the output was moved to. The
report is in the plan's output: report.md, report.json, two PNGs for each corpus and one of
histories by length (with matplotlib).

--report-only writes it from the runs that are finished. --insert-into PAGE.md also puts its tables
of losses into a page, between the lines <!-- experiment NAME --> (NAME.yaml is the configuration)
and <!-- end of experiment -->.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools.experiment

from megaegpt.arguments import ArgumentParser, number, path
from megaegpt.errors import DataError, LaunchError, exits_cleanly
from megaegpt.files import write_whole
from megaegpt.parallel.launcher_variables import is_launched, started_processes
from tools.experiment.plan import ExperimentPlan, load_plan

_STARTED = time.monotonic()


@exits_cleanly
def main() -> None:
    """Run what is missing and report."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the experiment")
    parser.add_argument("--output", type=path, metavar="DIR", help="instead of the plan's")
    parser.add_argument(
        "--exit-minutes", type=number(least=0), metavar="M", help="save and stop after M"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--insert-into", type=path, metavar="PAGE", help="a Markdown page")
    arguments = parser.parse_args()
    if arguments.report_only and arguments.exit_minutes is not None:
        parser.error("--exit-minutes stops training, and --report-only trains nothing: give one")
    plan = load_plan(arguments.config)
    if arguments.output is not None:
        plan = dataclasses.replace(plan, output=str(arguments.output))
    if arguments.report_only or _run(plan, arguments.exit_minutes):
        report = _report(plan)
        if (page := arguments.insert_into) is not None:
            _insert(report, page, Path(arguments.config).stem)


def _run(plan: ExperimentPlan, exit_minutes: float | None) -> bool:
    """Whether everything is finished."""
    from megaegpt.parallel.launch import joined_processes
    from megaegpt.training.stopping import StopRequests
    from tools.experiment.runs import Experiment, StoppedError

    if is_launched() and (started_processes() or 1) > 1:
        error = LaunchError("an experiment is one process: start it without a launcher")
        error.on_every_rank = True
        raise error
    with joined_processes(1) as grid:
        try:
            Experiment(plan, grid, StopRequests(exit_minutes, _STARTED)).run()
        except StoppedError:
            print("stopped: the same command goes on from here")
            return False
    return True


def _report(plan: ExperimentPlan) -> dict[str, Any]:
    from tools.experiment.plots import write_plots
    from tools.experiment.report import collect, markdown

    folder = Path(plan.output)
    report = collect(plan)
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    page = markdown(report, write_plots(report, folder))
    write_whole(folder / "report.md", page.encode())
    print("\n".join(["", *report["findings"], "", f"report: {folder / 'report.md'}"]))
    return report


def _insert(report: dict[str, Any], page: Path, name: str) -> None:
    from tools.experiment.report import insert

    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{page}: cannot be read ({error})") from None
    write_whole(page, insert(text, report, name).encode())


if __name__ == "__main__":
    main()
