"""Say what a run will take on given machines: memory, operations, communication, time.

    python tools/plan.py --config configs/gpt2_124m.yaml --gpu h100 --gpus 8
    python tools/plan.py --config X.yaml --gpu a100 --gpus 64 --alternatives model.num_layers=48
    python tools/plan.py --gpu h100 --gpus 1 --roofline
    python tools/plan.py --published

Parameters and operations are counted, and memory and communication follow from a micro-step played
through with tensors that have no memory. Time is simulated: each operator at the speed that a GPU
reaches, and of the communication what no computation hides; all that this assumes is printed, and
--published holds it against runs that others have measured. A GPU that the table does not know, or
--efficiency, makes it an estimate: the computation at a share of the peak, and the communication at
the data sheet's speed, one after the other. What follows the options as section.key=value replaces
values of the configuration. --roofline gives the least time that the operators of a step can take,
and the most MFU; without --config of the sizes of GPT-2.

Of a run that fine-tunes, the model is that of training.initialize_from, and all records count as
long as it takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megaegpt.arguments import ArgumentParser, integer, number
from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.loading import load_config
from megaegpt.errors import CheckpointError, ConfigError, exits_cleanly
from megaegpt.planning.hardware import accelerator_names, find_accelerator
from megaegpt.text_tables import format_table, percentage

if TYPE_CHECKING:  # torch is imported once the command line is right
    from megaegpt.planning.plan import Plan
    from megaegpt.planning.simulation import Simulation

_GPUS_OF_A_MACHINE = 8
_MOST_GPUS = 1 << 20
_EFFICIENCY = 0.5
"""Share of the peak where a step is not simulated."""


@exits_cleanly
def main() -> None:
    """Print the plan."""
    arguments = _parse_arguments()
    if arguments.published:
        for line in published():
            print(line)
        return
    from megaegpt.planning.plan import Machines, make_plan

    if arguments.config is None:
        for line in gpt2_ceilings(arguments.gpu):
            print(line)
        return
    overrides, notices = _enough_samples(arguments)
    config = load_config(arguments.config, overrides, arguments.gpus)
    if config.data.instructions.train:
        config, notice = _with_model_of_weights(config)
        notices.append(notice)
    encoder, left_out = _find_encoder(config)
    per_node = arguments.per_node or min(arguments.gpus, _GPUS_OF_A_MACHINE)
    machines = Machines(find_accelerator(arguments.gpu, per_node), arguments.gpus, per_node)
    replan = functools.partial(
        make_plan,
        machines=machines,
        encoder=encoder,
        flops=None if arguments.tflops is None else 1e12 * arguments.tflops,
        efficiency=arguments.efficiency or _EFFICIENCY,
    )
    plan = replan(config)
    simulated = simulation_of(plan, encoder, arguments)
    for line in [
        *notices,
        *left_out,
        *describe(plan, simulated, arguments.efficiency or _EFFICIENCY),
    ]:
        print(line)
    if arguments.roofline:
        for line in roofline_of(plan, encoder):
            print(line)
    if arguments.scaling:
        for line in scaling(plan, encoder, arguments.scaling):
            print(line)
    if arguments.check_ranks:
        for line in check_ranks(plan, encoder, arguments.check_ranks):
            print(line)
    if arguments.alternatives or not plan.fits:
        for line in _alternatives(plan, replan, encoder, arguments):
            print(line)


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML of the run")
    parser.add_argument("--gpu", help=f"one of {', '.join(accelerator_names())}")
    parser.add_argument("--gpus", type=integer(1, _MOST_GPUS), help="of all machines together")
    parser.add_argument(
        "--per-node", type=integer(1, _MOST_GPUS), help="GPUs of a machine (default: at most 8)"
    )
    parser.add_argument(
        "--tflops",
        type=number(above=0, most=1e6),
        help="peak of a GPU, where the table does not have it",
    )
    parser.add_argument(
        "--efficiency",
        type=number(above=0, most=1),
        help="share of the peak that the computation reaches, in the place of a simulation "
        f"(default, where there can be none: {_EFFICIENCY})",
    )
    parser.add_argument(
        "--alternatives", action="store_true", help="other ways to run it, though this one fits"
    )
    parser.add_argument(
        "--roofline", action="store_true", help="the least time of a step, by its operators"
    )
    parser.add_argument(
        "--check-ranks",
        type=integer(1, _MOST_GPUS),
        metavar="N",
        help="play about N of the ranks, and say whether they all make the same collectives",
    )
    parser.add_argument(
        "--scaling",
        type=Path,
        metavar="PNG",
        help="a step on 8 GPUs, twice as many and so on, and on --gpus, with a rank's samples as "
        "they are; draws it, too",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="measured runs of Megatron, torchtitan and llm-foundry beside what is predicted",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that differ from the file"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.published:
        if len(sys.argv) > 2:
            parser.error("--published shows other programs' runs and takes nothing else")
        return arguments
    missing = [name for name in ("gpu", "gpus") if getattr(arguments, name) is None]
    if missing:
        names = ", ".join("--" + name for name in missing)
        parser.error(f"the following arguments are required: {names}")
    if arguments.config is None and (not arguments.roofline or arguments.overrides):
        parser.error("the following arguments are required: --config")
    if arguments.config is None and (unused := _of_a_run(parser, arguments)):
        parser.error(
            f"without --config --roofline is of GPT-2's sizes on one GPU and takes no {unused}: "
            "name a run by --config"
        )
    return arguments


def _of_a_run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """The options given that only a configuration's plan takes; ``--gpus 1`` is none."""
    options = ("gpus", "per_node", "tflops", "efficiency", "alternatives", "scaling", "check_ranks")
    plain = {"gpus": 1, **{name: parser.get_default(name) for name in options[1:]}}
    given = [name for name in options if getattr(arguments, name) != plain[name]]
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _enough_samples(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The overrides, with a larger global batch where the file's has no micro-batch for each
    data-parallel rank and none was asked for; and a notice of it.
    """
    key, overrides = "training.global_batch_size", list(arguments.overrides)
    config = load_config(arguments.config, overrides)
    dp_size = arguments.gpus // config.parallel.ranks_of_a_sample
    size = config.training.micro_batch_size
    least, given = dp_size * (1 if size == "auto" else size), config.training.global_batch_size
    if given >= least or any(text.startswith(key) for text in overrides):
        return overrides, []
    notice = f"notice: {key}={least}, not {given}: a micro-batch for each of {dp_size} ranks"
    return [*overrides, f"{key}={least}"], [notice]


def _with_model_of_weights(config: RunConfig) -> tuple[RunConfig, str]:
    """A run that fine-tunes with its model, which its configuration does not say; and a notice of
    the records, which are not read.
    """
    from megaegpt.training.finetuning import planned_config

    config = planned_config(config)
    return config, (
        "notice: the step, its memory and its time are those of records of "
        f"{config.model.sample_len:,} tokens, the longest that the model takes"
    )


def _find_encoder(config: RunConfig) -> tuple[ModelConfig | None, list[str]]:
    if not config.model.needs_encoder:
        return None, []
    from megaegpt.training.feature_stores import find_encoder

    try:
        return find_encoder(config), []
    except (CheckpointError, ConfigError) as error:
        return None, [f"notice: the encoder is left out of the numbers below: {error}"]


def simulation_of(
    plan: Plan, encoder: ModelConfig | None, arguments: argparse.Namespace
) -> Simulation | None:
    """The plan's step; None where the GPU is not in the table, or a share of its peak was given."""
    from megaegpt.planning.simulation import can_simulate, simulate

    flat = arguments.efficiency or arguments.tflops or plan.time is None
    if flat or not can_simulate(plan.machines, plan.precision):
        return None
    return simulate(plan, encoder)


def describe(plan: Plan, simulated: Simulation | None, efficiency: float) -> Iterator[str]:
    """The plan, a line each, and a warning if it does not fit."""
    from megaegpt.planning.hardware import USABLE_MEMORY
    from megaegpt.planning.summary import describe_run

    config, machines = plan.config, plan.machines
    yield from describe_run(
        config, plan.size, plan.dp_size, plan.precision, str(machines), plan.memory
    )
    if plan.micro_batch is not None:
        yield f"{'batch':<11}{plan.micro_batch}"
    sent = plan.communication
    matrices = (
        f", Muon's matrices {_gb(sent.gathered_matrices)} gathered and {_gb(sent.cut_matrices)} "
        "exchanged"
    )
    yield (
        f"{'traffic':<11}a rank's collectives a step: gradients "
        f"{_gb(sent.gradients + sent.scattered)}, weights "
        f"{_gb(sent.weights)}, tensor-parallel {_gb(sent.tensor_parallel)}, sequence-parallel "
        f"{_gb(sent.sequence_parallel)} (half as much is sent of them), context-parallel "
        f"{_gb(sent.context_parallel)}{matrices if plan.muon else ''}"
    )
    times = _estimated(plan, efficiency) if simulated is None else _simulated(plan, simulated)
    for title, line in zip(itertools.chain(["time"], itertools.repeat("")), times, strict=False):
        yield f"{title:<11}{line}"
    if simulated is not None:
        from megaegpt.planning.simulation import assumptions

        yield "the time assumes, and --published holds against what others have measured:"
        yield format_table(assumptions(simulated), names=3)
    if not plan.fits:
        yield (
            f"warning: {_gib(plan.memory.total)} do not fit in {USABLE_MEMORY:.0%} of "
            f"{_gib(machines.accelerator.memory)}: lower training.micro_batch_size, recompute by "
            "training.activation_checkpointing, or raise parallel.tensor_parallel_size or --gpus"
        )


def _simulated(plan: Plan, simulated: Simulation) -> Iterator[str]:
    from megaegpt.planning.simulation import describe_simulation
    from megaegpt.text_tables import short_count, short_time

    yield from describe_simulation(simulated)
    whole = short_time(plan.config.training.steps * simulated.seconds)
    yield f"{short_count(plan.tokens / simulated.seconds)} tokens/s, {whole} for the run"


def _estimated(plan: Plan, efficiency: float) -> Iterator[str]:
    from megaegpt.text_tables import short_count, short_time

    if plan.config.parallel.offload != "none":
        yield "unknown: how fast a machine's CPUs update what is offloaded"
        return
    if plan.size.frozen:
        yield (
            "n/a: parts are frozen, and operations are counted as if everything were trained; a "
            "step is simulated on a GPU of the table, without --efficiency and --tflops"
        )
        return
    if plan.time is None or plan.tokens_per_second is None:
        yield f"unknown: give the GPU's peak in {plan.precision} by --tflops"
        return
    time = plan.time
    whole = short_time(plan.config.training.steps * time.total)
    yield (
        f"about {time.total:.3g} s a step at {efficiency:.0%} of the peak: compute "
        f"{time.compute:.3g}, gradients {time.gradients:.3g}, weights {time.weights:.3g}, "
        f"tensor-parallel {time.tensor_parallel:.3g}, context-parallel {time.context_parallel:.3g}"
        + (f", Muon's matrices {time.matrices:.3g}" if plan.muon else "")
    )
    yield f"{short_count(plan.tokens_per_second)} tokens/s, {whole} for the run"


def published() -> Iterator[str]:
    """Other programs' runs, measured and predicted."""
    from megaegpt.planning.published import compare_published, published_runs

    yield "tokens a second and GPU in bf16, measured by others and predicted by this program:"
    yield format_table(compare_published(published_runs()), names=1)


def roofline_of(plan: Plan, encoder: ModelConfig | None) -> Iterator[str]:
    """The parts of a step, and the most that it can reach."""
    from megaegpt.planning.roofline import assumptions, describe_roofline, make_roofline

    roofline = make_roofline(plan, encoder)
    yield "the least time of a step on a rank:"
    yield format_table(describe_roofline(roofline), names=1)
    most = (roofline.mfu("eager", fused_head=False), roofline.mfu("eager"))
    plain, head, blocks, own = map(percentage, (*most, roofline.mfu("compiled"), roofline.mfu()))
    yield (
        f"a micro-step reaches at most {plain} MFU with nothing compiled, {head} with the head's "
        f"operators compiled, {blocks} with the blocks compiled too, {own} with their own "
        "operators instead, where they have such: bytes a logit between the head's products "
        f"{roofline.bytes_a_logit(fused=False):.0f}, compiled "
        f"{roofline.bytes_a_logit():.1f}"
    )
    if roofline.slowness is not None:
        yield (
            f"the blocks' own operators are worth it until their two products with GELU take "
            f"{roofline.slowness:.0%} longer than cuBLAS's"
        )
    yield assumptions()


def scaling(plan: Plan, encoder: ModelConfig | None, picture: Path) -> Iterator[str]:
    """The run on fewer GPUs up to the plan's, as a table and a picture."""
    from megaegpt.planning.scaling import describe_scaling, plot_scaling, weak_scaling

    steps = weak_scaling(plan, encoder)
    yield "the same samples a rank and step, on more and more GPUs:"
    yield format_table(describe_scaling(steps), names=0)
    accelerator = plan.machines.accelerator.name
    plot_scaling(steps, picture, f"{plan.size.parameters / 1e9:.1f}B on {accelerator}")
    yield f"wrote {picture}"


def check_ranks(plan: Plan, encoder: ModelConfig | None, count: int) -> Iterator[str]:
    """What ranks of the run do differently in a forward and a backward pass, if anything."""
    from megaegpt.planning.rank_check import choose_ranks, find_differences, record_rank

    config, world_size = plan.config, plan.machines.gpus
    ranks = choose_ranks(world_size, config.parallel.ranks_of_a_sample, count)
    records = [record_rank(config, r, world_size, plan.precision, encoder) for r in ranks]
    differences = find_differences(records)
    yield from differences
    if differences:
        raise ConfigError("ranks differ, so that the run would hang: see above")
    yield (
        f"{len(ranks)} of {world_size} ranks have their slices of {len(records[0].shapes)} "
        f"parameters, and make the same {len(records[0].calls)} collectives in a micro-step; "
        "DeepSpeed's own are not among them"
    )


def gpt2_ceilings(gpu: str) -> Iterator[str]:
    """The sizes of GPT-2 on one GPU."""
    from megaegpt.planning.plan import Machines, make_plan
    from megaegpt.planning.roofline import (
        assumptions,
        compare_rooflines,
        gpt2_runs,
        make_roofline,
    )

    machines = Machines(find_accelerator(gpu, 1), 1, 1)
    rooflines = {n: make_roofline(make_plan(run, machines)) for n, run in gpt2_runs().items()}
    yield f"the most MFU on one {machines.accelerator.name}, by what is compiled, and its parts:"
    yield format_table(compare_rooflines(rooflines), names=1)
    yield assumptions()


def _alternatives(
    plan: Plan,
    replan: Callable[[RunConfig], Plan],
    encoder: ModelConfig | None,
    arguments: argparse.Namespace,
) -> Iterator[str]:
    from megaegpt.planning.plan import (
        alternatives_over_context,
        impossible_sizes,
        known_seconds,
    )

    steps: dict[int, tuple[Plan, Simulation | None]] = {}

    def step(other: Plan) -> Simulation | None:
        """Once a plan, which is kept so that no other has its number."""
        if id(other) not in steps:
            steps[id(other)] = other, simulation_of(other, encoder, arguments)
        return steps[id(other)][1]

    def seconds(other: Plan) -> float:
        simulated = step(other)
        return known_seconds(other) if simulated is None else simulated.seconds

    yield from compare(
        alternatives_over_context(plan, replan, seconds), impossible_sizes(plan), step
    )


def compare(
    plans: list[Plan], impossible: dict[int, str], step: Callable[[Plan], Simulation | None]
) -> Iterator[str]:
    """A table of plans, the fastest that fits first, and why others are not possible.

    Args:
        impossible: by tensor-parallel size, why it cannot be.
        step: a plan's simulated one.
    """
    if not any(plan.fits for plan in plans):
        yield "nothing fits: more GPUs, GPUs with more memory, or a smaller model"
    else:
        unknown = any(plan.fits and plan.time is None for plan in plans)
        yield (
            "recommended, with the largest micro-batch that fits, the fastest first"
            f"{', those whose time is not known last' if unknown else ''}:"
        )
    columns = (
        "tensor_parallel_size",
        "sequence_parallel",
        "context_parallel_size",
        "zero_stage",
        "offload",
        "activation_checkpointing",
        "micro_batch_size",
    )
    table: list[tuple[str, ...]] = [(*columns, "memory a rank", "s a step", "MFU", "exposed")]
    for plan in plans:
        training, parallel = plan.config.training, plan.config.parallel
        sequence = str(parallel.sequence_parallel).lower()
        tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
        cut = (str(tp), sequence, str(cp), str(parallel.zero_stage), parallel.offload)
        choices = (*cut, training.activation_checkpointing, str(training.micro_batch_size))
        times = _times(plan, step(plan)) if plan.fits else (f"does not fit: {_largest(plan)}",)
        table.append((*choices, _gib(plan.memory.total), *times))
    yield format_table(table, names=0)
    for size, why in impossible.items():
        yield f"tensor_parallel_size {size} is not possible: {why}"


def _times(plan: Plan, simulated: Simulation | None) -> tuple[str, ...]:
    """Seconds, MFU and the exposed share of a step."""
    if simulated is None:
        return ("n/a" if plan.time is None or plan.size.frozen else f"{plan.time.total:.3g}",)
    exposed = simulated.exposed / simulated.seconds
    return f"{simulated.seconds:.3g}", percentage(simulated.mfu), f"{exposed:.1%}"


def _largest(plan: Plan) -> str:
    """The part of a rank's memory that takes most."""
    size, name = max((size, name) for name, size in dataclasses.asdict(plan.memory).items())
    return f"{name} take {_gib(size)}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


if __name__ == "__main__":
    main()
