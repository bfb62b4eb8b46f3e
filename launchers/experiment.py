"""Ask whether EGPT uses its context: prepare the texts, pretrain the encoder, train every variant
with every seed, measure, and write the report.

    python launchers/experiment.py --config configs/experiments/smoke.yaml

One process, on the GPU if there is one. What is finished is not done again: after an interruption
(Ctrl-C and SIGTERM save first) the same command goes on. The report is in the plan's output:
report.md, report.json, a PNG for each corpus.

--report-only writes it from the runs that are finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from megaegpt.data.files import write_whole
from megaegpt.errors import exits_cleanly
from megaegpt.experiment.plan import ExperimentPlan, load_plan

_STARTED = time.monotonic()


@exits_cleanly
def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the experiment")
    parser.add_argument("--output", metavar="DIR", help="instead of the plan's")
    parser.add_argument("--exit-minutes", type=float, metavar="M", help="save and stop after M")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    plan = load_plan(arguments.config)
    if arguments.output is not None:
        plan = dataclasses.replace(plan, output=arguments.output)
    if arguments.report_only or _run(plan, arguments.exit_minutes):
        _report(plan)


def _run(plan: ExperimentPlan, exit_minutes: float | None) -> bool:
    """Whether everything is finished."""
    import torch.distributed as dist

    from megaegpt.experiment.runs import Experiment, StoppedError
    from megaegpt.parallel.grid import ProcessGrid
    from megaegpt.training.engine import init_distributed
    from megaegpt.training.stopping import StopRequests

    grid = ProcessGrid.create(1, init_distributed())
    try:
        Experiment(plan, grid, StopRequests(exit_minutes, _STARTED)).run()
    except StoppedError:
        print("stopped: the same command goes on from here")
        return False
    finally:
        dist.destroy_process_group()
    return True


def _report(plan: ExperimentPlan) -> None:
    from megaegpt.experiment.plots import write_plots
    from megaegpt.experiment.report import collect, markdown

    folder = Path(plan.output)
    report = collect(plan)
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    page = markdown(report, write_plots(report, folder))
    write_whole(folder / "report.md", page.encode())
    print("\n".join(["", *report["findings"], "", f"report: {folder / 'report.md'}"]))


if __name__ == "__main__":
    main()
