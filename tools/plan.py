"""Say what a run will take on given machines: memory, operations, communication, time.

    python tools/plan.py --config configs/gpt2_124m.yaml --gpu h100 --gpus 8
    python tools/plan.py --config X.yaml --gpu a100 --gpus 64 --alternatives model.num_layers=48
    python tools/plan.py --gpu h100 --gpus 1 --roofline

Parameters and operations are counted, and memory and communication follow from a micro-step played
through with tensors that have no memory. Time is an estimate: the computation at a share of the
GPU's peak, and the communication at the data sheet's speed, one after the other. What follows the
options as section.key=value replaces values of the configuration. --roofline gives the least time
that the operators of a step can take, and the most MFU; without --config of the sizes of GPT-2.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megaegpt.arguments import ArgumentParser, integer, number
from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.loading import load_config
from megaegpt.errors import CheckpointError, ConfigError, exits_cleanly
from megaegpt.planning.hardware import accelerator_names, find_accelerator
from megaegpt.text_tables import format_table

if TYPE_CHECKING:  # torch is imported once the command line is right
    from megaegpt.planning.plan import Plan

_GPUS_OF_A_MACHINE = 8
_MOST_GPUS = 1 << 20


@exits_cleanly
def main() -> None:
    """Print the plan."""
    arguments = _parse_arguments()
    from megaegpt.planning.plan import Machines, alternatives_over_context, make_plan

    if arguments.config is None:
        for line in gpt2_ceilings(arguments.gpu):
            print(line)
        return
    config = load_config(arguments.config, arguments.overrides, arguments.gpus)
    encoder, notices = _find_encoder(config)
    per_node = arguments.per_node or min(arguments.gpus, _GPUS_OF_A_MACHINE)
    machines = Machines(find_accelerator(arguments.gpu, per_node), arguments.gpus, per_node)
    replan = functools.partial(
        make_plan,
        machines=machines,
        encoder=encoder,
        flops=None if arguments.tflops is None else 1e12 * arguments.tflops,
        efficiency=arguments.efficiency,
    )
    plan = replan(config)
    for line in [*notices, *describe(plan, arguments.efficiency)]:
        print(line)
    if arguments.roofline:
        for line in roofline_of(plan, encoder):
            print(line)
    if arguments.alternatives or not plan.fits:
        for line in compare(alternatives_over_context(plan, replan)):
            print(line)


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML of the run")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(accelerator_names())}")
    parser.add_argument(
        "--gpus", required=True, type=integer(1, _MOST_GPUS), help="of all machines together"
    )
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
        default=0.5,
        help="share of the peak that the computation reaches (default: 0.5)",
    )
    parser.add_argument(
        "--alternatives", action="store_true", help="other ways to run it, though this one fits"
    )
    parser.add_argument(
        "--roofline", action="store_true", help="the least time of a step, by its operators"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that differ from the file"
    )
    arguments = parser.parse_intermixed_args()
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
    options = ("gpus", "per_node", "tflops", "efficiency", "alternatives")
    plain = {"gpus": 1, **{name: parser.get_default(name) for name in options[1:]}}
    given = [name for name in options if getattr(arguments, name) != plain[name]]
    return ", ".join("--" + name.replace("_", "-") for name in given)


def _find_encoder(config: RunConfig) -> tuple[ModelConfig | None, list[str]]:
    if not config.model.needs_encoder:
        return None, []
    from megaegpt.training.feature_stores import find_encoder

    try:
        return find_encoder(config), []
    except (CheckpointError, ConfigError) as error:
        return None, [f"notice: the encoder is left out of the numbers below: {error}"]


def describe(plan: Plan, efficiency: float) -> Iterator[str]:
    """The plan, a line each, and a warning if it does not fit."""
    from megaegpt.planning.hardware import USABLE_MEMORY
    from megaegpt.planning.summary import describe_run
    from megaegpt.text_tables import short_count, short_time

    config, machines = plan.config, plan.machines
    yield from describe_run(
        config, plan.size, plan.dp_size, plan.precision, str(machines), plan.memory
    )
    if plan.micro_batch is not None:
        yield f"{'batch':<11}{plan.micro_batch}"
    sent = plan.communication
    yield (
        f"{'traffic':<11}a rank's collectives a step: gradients "
        f"{_gb(sent.gradients + sent.scattered)}, weights "
        f"{_gb(sent.weights)}, tensor-parallel {_gb(sent.tensor_parallel)}, sequence-parallel "
        f"{_gb(sent.sequence_parallel)} (half as much is sent of them), context-parallel "
        f"{_gb(sent.context_parallel)}"
    )
    if config.parallel.offload != "none":
        yield f"{'time':<11}unknown: how fast a machine's CPUs update what is offloaded"
    elif plan.time is None or plan.tokens_per_second is None:
        yield f"{'time':<11}unknown: give the GPU's peak in {plan.precision} by --tflops"
    else:
        time = plan.time
        whole = short_time(config.training.steps * time.total)
        yield (
            f"{'time':<11}about {time.total:.3g} s a step at {efficiency:.0%} of the peak: compute "
            f"{time.compute:.3g}, gradients {time.gradients:.3g}, weights {time.weights:.3g}, "
            f"tensor-parallel {time.tensor_parallel:.3g}, context-parallel "
            f"{time.context_parallel:.3g}"
        )
        yield f"{'':<11}{short_count(plan.tokens_per_second)} tokens/s, {whole} for the run"
    if not plan.fits:
        yield (
            f"warning: {_gib(plan.memory.total)} do not fit in {USABLE_MEMORY:.0%} of "
            f"{_gib(machines.accelerator.memory)}: lower training.micro_batch_size, recompute by "
            "training.activation_checkpointing, or raise parallel.tensor_parallel_size or --gpus"
        )


def roofline_of(plan: Plan, encoder: ModelConfig | None) -> Iterator[str]:
    """The parts of a step, and the most that it can reach."""
    from megaegpt.planning.roofline import assumptions, describe_roofline, make_roofline

    roofline = make_roofline(plan, encoder)
    yield "the least time of a step on a rank:"
    yield format_table(describe_roofline(roofline), names=1)
    yield (
        f"a micro-step reaches at most {roofline.mfu('eager', fused_head=False):.1%} MFU with "
        f"nothing compiled, {roofline.mfu('eager'):.1%} with the head's operators compiled, "
        f"{roofline.mfu('compiled'):.1%} with the blocks compiled too, {roofline.mfu():.1%} with "
        "their own operators instead, where they have such: bytes a logit between the head's "
        f"products {roofline.bytes_a_logit(fused=False):.0f}, compiled "
        f"{roofline.bytes_a_logit():.1f}"
    )
    if roofline.slowness is not None:
        yield (
            f"the blocks' own operators are worth it until their two products with GELU take "
            f"{roofline.slowness:.0%} longer than cuBLAS's"
        )
    yield assumptions()


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


def compare(plans: list[Plan]) -> Iterator[str]:
    """A table of plans that fit, the fastest first."""
    if not plans:
        yield "nothing fits: more GPUs, GPUs with more memory, or a smaller model"
        return
    yield "recommended, with the largest micro-batch that fits, the fastest first:"
    columns = (
        "tensor_parallel_size",
        "sequence_parallel",
        "context_parallel_size",
        "zero_stage",
        "activation_checkpointing",
        "micro_batch_size",
    )
    table = [(*columns, "memory a rank", "s a step")]
    for plan in plans:
        training, parallel = plan.config.training, plan.config.parallel
        seconds = "n/a" if plan.time is None else f"{plan.time.total:.3g}"
        sequence = str(parallel.sequence_parallel).lower()
        tp, cp = parallel.tensor_parallel_size, parallel.context_parallel_size
        cut = (str(tp), sequence, str(cp), str(parallel.zero_stage))
        choices = (*cut, training.activation_checkpointing, str(training.micro_batch_size))
        table.append((*choices, _gib(plan.memory.total), seconds))
    yield format_table(table, names=0)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


if __name__ == "__main__":
    main()
