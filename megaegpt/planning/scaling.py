"""One run on more and more GPUs, each rank with the same work: step time and what is exposed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megaegpt.config import ModelConfig
from megaegpt.config.training import BatchRampConfig
from megaegpt.errors import ConfigError
from megaegpt.planning.plan import Plan, make_plan
from megaegpt.planning.simulation import Simulation, reachable_rates, simulate, trace_blocks
from megaegpt.text_tables import percentage

LEAST_GPUS = 8


def weak_scaling(plan: Plan, encoder: ModelConfig | None = None) -> list[Simulation]:
    """Steps on 8 GPUs (or as many as share a sample), twice as many, and so on, and last on the
    plan's; the samples of a rank and step stay.

    Args:
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.

    Raises:
        ConfigError: as for :func:`~megaegpt.planning.simulation.simulate`.
    """
    group = plan.config.parallel.ranks_of_a_sample
    of_a_rank = plan.config.training.global_batch_size // plan.dp_size
    rates = reachable_rates(plan.machines, plan.precision)
    traced = trace_blocks(plan.config, plan.precision, rates, encoder)

    def step_on(gpus: int) -> Simulation:
        training = dataclasses.replace(
            plan.config.training,
            global_batch_size=of_a_rank * (gpus // group),
            batch_ramp=BatchRampConfig(),  # the plan is of the last steps
        )
        config = dataclasses.replace(plan.config, training=training)
        machines = dataclasses.replace(plan.machines, gpus=gpus)
        return simulate(make_plan(config, machines, encoder), traced=traced)

    counts, gpus = [], -(-LEAST_GPUS // group) * group
    while gpus < plan.machines.gpus:
        counts.append(gpus)
        gpus *= 2
    return [step_on(count) for count in [*counts, plan.machines.gpus]]


def describe_scaling(steps: Sequence[Simulation]) -> list[tuple[str, ...]]:
    """A table."""
    rows: list[tuple[str, ...]] = [
        ("GPUs", "s a step", "exposed", "of the step", "MFU", "tokens/s a GPU", "memory a rank")
    ]
    for step in steps:
        rows.append(
            (
                f"{step.plan.machines.gpus:,}",
                f"{step.seconds:.3f}",
                f"{step.exposed:.3f} s",
                f"{step.exposed / step.seconds:.1%}",
                percentage(step.mfu),
                f"{step.tokens_per_gpu:,.0f}",
                f"{step.plan.memory.total / 2**30:.1f} GiB",
            )
        )
    return rows


def plot_scaling(steps: Sequence[Simulation], path: Path, title: str) -> None:
    """Draw step time and exposed communication against GPUs, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--scaling needs matplotlib: pip install matplotlib") from None
    gpus = [step.plan.machines.gpus for step in steps]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(gpus, [step.seconds for step in steps], "o-", label="step")
    axes.plot(gpus, [step.exposed for step in steps], "s--", label="exposed communication")
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{count:,}" for count in gpus])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds, simulated")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
