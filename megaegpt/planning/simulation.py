"""The time of a training step on many GPUs, played through without them.

A rank's computation is that of its operators (:mod:`megaegpt.planning.roofline`), at the shares of
a data sheet's peaks that :class:`~megaegpt.planning.hardware.Accelerator` says are reached. Of
blocks that are alike one and two are traced, and the rest follows. Communication is what the plan
counts, at a reachable share of the links' speed; of it counts what no computation hides.
:func:`assumptions` lists all of it, and :mod:`megaegpt.planning.published` holds it against what
others have measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.deepspeed_config import deepspeed_config
from megaegpt.config.parallel import effective_zero_stage
from megaegpt.errors import ConfigError
from megaegpt.planning.memory_trace import MicroStep, trace_micro_step
from megaegpt.planning.plan import Machines, Plan, StepTime
from megaegpt.planning.roofline import (
    BYTES_OF_ADAMW,
    BYTES_OF_MUON,
    REACHED_BANDWIDTH,
    SHORTEST,
    Cost,
    OperatorCosts,
    Rates,
    compiled_share,
    update_seconds,
)
from megaegpt.planning.short_runs import ShortRun, short_runs
from megaegpt.precision import Precision
from megaegpt.text_tables import percentage

HALF_DEPTH = 320
"""Terms of a product's sums with which it reaches half of its speed."""
REACHED_LINKS = 0.8
"""Share of a link's speed that large collectives reach, of NVLink's and of the network's."""
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6
"""Seconds that a ring's step takes beside its bytes, within a machine and to another: the latencies
by which NCCL 2.18 chooses an algorithm (``hwLat`` of its ``tuning.cc``, ring, ``simple``)."""
_FULL_HEAD = 128
"""Columns of a head at which attention is as fast as the table of GPUs says."""
_FORWARD = 1 / 3
"""Share of a micro-step's computation in the forward pass, without recomputation."""
_SUMS_A_BLOCK = 4
"""All-reduces of a block over its tensor-parallel ranks, or as many pairs of gathering and
scattering: one behind attention and one behind the MLP, forward and backward."""


@dataclass(frozen=True)
class Program:
    """What the time of a step depends on beside the configuration: how a program communicates."""

    hides_gradients: bool
    """They are sent as the backward pass makes them."""
    hides_weights: bool
    """They are gathered for a block while the one before it is computed."""
    pieces: int
    """Collectives by which gradients, and weights, are sent in a step; the first of the weights and
    the last of the gradients are never hidden."""
    hides_tensor_parallel: float = 0.0
    """Share of the time of tensor-parallel communication."""
    repeats_products: float = 0.0
    """Share of the blocks' forward products that the backward pass repeats, beside those of
    ``activation_checkpointing``."""

    @staticmethod
    def of(plan: Plan) -> Program:
        """DeepSpeed's: buckets, of which ``overlap_comm`` hides those of gradients from stage 2 on;
        at stage 3 weights are fetched before they are needed.
        """
        config, dp_size = plan.config, plan.dp_size
        stage = effective_zero_stage(config.parallel.zero_stage, plan.precision)
        parameters = plan.size.parameters // config.parallel.tensor_parallel_size
        options = deepspeed_config(config, dp_size, plan.precision, parameters)
        buckets = math.ceil(parameters / options["zero_optimization"]["reduce_bucket_size"])
        return Program(stage >= 2 and config.parallel.overlap_comm, stage == 3, buckets)


@dataclass(frozen=True)
class Sent:
    """One kind of communication in a step."""

    seconds: float
    exposed: float
    """Of them, those that no computation hides."""


@dataclass(frozen=True)
class Compute:
    """Seconds of a rank's micro-step, forward and backward, by kinds of operators."""

    products: float
    """With weights, those that recomputation repeats among them."""
    attention: float
    head: float
    """Between the head's two products."""
    rest: float
    """Norms, elementwise operators, copies and look-ups."""

    @property
    def total(self) -> float:
        """Of all kinds."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Simulation:
    """A step of one rank; all ranks do the same."""

    plan: Plan
    compute: Compute
    micro_steps: int
    update: float
    """Seconds of the optimizer's pass over its share."""
    sent: Mapping[str, Sent]
    """By the kinds of :class:`~megaegpt.planning.plan.StepTime`."""
    program: Program

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides."""
        return sum(kind.exposed for kind in self.sent.values())

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute.total * self.micro_steps + self.update + self.exposed

    @property
    def tokens_per_gpu(self) -> float:
        """Predicted tokens a second and GPU."""
        return self.plan.tokens / self.seconds / self.plan.machines.gpus

    @property
    def mfu(self) -> float | None:
        """The model's operations over the peak, recomputed ones not among them; None where parts
        are frozen, as they are counted as if everything were trained.
        """
        if self.plan.size.frozen:
            return None
        accelerator = self.plan.machines.accelerator
        peak = accelerator.peak_flops(self.plan.precision)
        assert peak is not None  # without it nothing is simulated
        return self.tokens_per_gpu * self.plan.size.flops_per_token / peak


def can_simulate(machines: Machines, precision: Precision) -> bool:
    """Whether the table knows the GPU's peak in that precision and its memory's speed."""
    accelerator = machines.accelerator
    known = accelerator.peak_flops(precision) is not None
    return known and accelerator.memory_bandwidth is not None


def simulate(
    plan: Plan,
    encoder: ModelConfig | None = None,
    program: Program | None = None,
    traced: TracedBlocks | None = None,
) -> Simulation:
    """The step of a plan.

    Args:
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        program: another than this one.
        traced: where blocks have been traced already.

    Raises:
        ConfigError: the table does not know the GPU's peak, or its memory's speed, or a CPU has a
            part in the step.
    """
    rates = reachable_rates(plan.machines, plan.precision)
    if plan.time is None:
        raise ConfigError(
            f"a step with parallel.offload={plan.config.parallel.offload} cannot be simulated: how "
            "fast a machine's CPUs update what is offloaded is not known; simulate it with none"
        )
    program = program or Program.of(plan)
    traced = traced or trace_blocks(plan.config, plan.precision, rates, encoder)
    compute = traced.compute(plan.config.training.compile, program.repeats_products)
    micro_steps = plan.config.gradient_accumulation(plan.dp_size)
    sent = _communicate(plan, plan.time, compute, program)
    update = update_seconds(plan, rates)
    return Simulation(plan, compute, micro_steps, update, sent, program)


def reachable_rates(machines: Machines, precision: Precision) -> Rates:
    """Of a GPU of the table.

    Raises:
        ConfigError: its peak in that precision, or its memory's speed, is not known.
    """
    accelerator = machines.accelerator
    peak = accelerator.peak_flops(precision)
    if peak is None or accelerator.memory_bandwidth is None:
        raise ConfigError(
            f"a step on {accelerator.name} in {precision} cannot be simulated: the table of GPUs "
            "does not have its speed"
        )
    return Rates(
        peak * accelerator.reached_products,
        peak * accelerator.reached_attention,
        accelerator.memory_bandwidth * REACHED_BANDWIDTH,
        HALF_DEPTH,
        _FULL_HEAD,
    )


@dataclass(frozen=True)
class TracedBlocks:
    """A rank's micro-step with few blocks, from which the one with all of them follows."""

    model: ModelConfig
    steps: Sequence[tuple[ShortRun, Mapping[str, Cost], MicroStep]]

    def compute(self, compiled: bool, repeats_products: float = 0.0) -> Compute:
        """Seconds with all blocks.

        Args:
            compiled: whether blocks are.
            repeats_products: see :class:`Program`.
        """
        whole: defaultdict[str, float] = defaultdict(float)
        blocks: defaultdict[str, float] = defaultdict(float)
        for run, costs, _ in self.steps:
            for kind, cost in costs.items():
                whole[kind] += run.whole * cost.seconds
                blocks[kind] += run.blocks * cost.seconds
        own = whole["own products"]
        products = whole["products"] + own + blocks["products"] * repeats_products * _FORWARD
        rest = whole["rest"]
        if compiled and not own:
            rest -= blocks["rest"] * (1 - compiled_share(self.model))
        return Compute(products, whole["attention"], whole["head"], rest)

    @property
    def summed(self) -> int:
        """``MicroStep.summed`` with all blocks."""
        return sum(run.whole * step.summed for run, _, step in self.steps)

    @property
    def cut(self) -> int:
        """``MicroStep.cut`` with all blocks."""
        return sum(run.whole * step.cut for run, _, step in self.steps)


def trace_blocks(
    config: RunConfig,
    precision: Precision,
    rates: Rates,
    encoder: ModelConfig | None = None,
    own_operators: bool = True,
) -> TracedBlocks:
    """Play few blocks through as a CUDA device computes them.

    Args:
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        own_operators: the head and, where they can, blocks are computed by this project's fused
            operators; otherwise as torch has them.
    """

    def of(run: ShortRun) -> tuple[ShortRun, Mapping[str, Cost], MicroStep]:
        counter = OperatorCosts(columns, rates)
        step = trace_micro_step(
            run.config,
            precision,
            encoder,
            "cuda",
            False,
            observed_by=counter,
            fused_head=own_operators,
            fused_blocks=None if own_operators else False,
        )
        return run, counter.costs, step

    columns = config.model.padded_vocab_size // config.parallel.tensor_parallel_size
    return TracedBlocks(config.model, [of(run) for run in short_runs(config)])


def _communicate(plan: Plan, time: StepTime, compute: Compute, program: Program) -> dict[str, Sent]:
    """Each kind of the plan's communication; a kind that no rule below hides is exposed."""
    micro_steps = plan.config.gradient_accumulation(plan.dp_size)
    forward = compute.total * _FORWARD
    hops = _hops(plan, program)
    sent = {}
    for field in dataclasses.fields(time):
        if field.name == "compute":
            continue
        seconds = getattr(time, field.name) / REACHED_LINKS
        seconds += hops.get(field.name, 0.0) if seconds else 0.0
        exposed = seconds
        if field.name == "tensor_parallel":
            exposed *= 1 - program.hides_tensor_parallel
        elif field.name == "gradients" and program.hides_gradients:
            beside = (compute.total - forward) * micro_steps
            exposed = max(seconds - beside, seconds / program.pieces)
        elif field.name == "weights" and program.hides_weights:
            exposed = max(seconds - forward * micro_steps, seconds / program.pieces)
        sent[field.name] = Sent(seconds, exposed)
    return sent


def _hops(plan: Plan, program: Program) -> dict[str, float]:
    """Seconds of a step's collectives beside their bytes, by kind."""
    config, machines, tp = plan.config, plan.machines, plan.config.parallel.tensor_parallel_size
    micro_steps, replicas = config.gradient_accumulation(plan.dp_size), machines.gpus // tp
    sums = _SUMS_A_BLOCK * config.model.num_layers * micro_steps
    return {
        "tensor_parallel": sums * sum_hops(machines, tp),
        "gradients": program.pieces * sum_hops(machines, replicas, tp),
        "weights": program.pieces * ring_hops(machines, replicas, tp),
        "matrices": _matrix_hops(plan),
    }


def _matrix_hops(plan: Plan) -> float:
    """Of Muon's: a gathering for each matrix, and one exchange for all that are cut."""
    machines, tp = plan.machines, plan.config.parallel.tensor_parallel_size
    gathered = [m for m in plan.muon.matrices if m.is_sliced] if plan.muon else []
    exchange = NVLINK_HOP if machines.gpus <= machines.per_node else NETWORK_HOP
    return len(gathered) * ring_hops(machines, tp) + exchange * (
        plan.communication.cut_matrices > 0
    )


def ring_hops(machines: Machines, ranks: int, stride: int = 1) -> float:
    """Seconds of a gathering or scattering over ``ranks``, ``stride`` apart, beside its bytes."""
    nodes = _nodes(machines, ranks, stride)
    return (ranks - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP


def sum_hops(machines: Machines, ranks: int, stride: int = 1) -> float:
    """The same of an all-reduce: by a ring, or between machines by a tree, which NCCL takes where
    it is faster.
    """
    nodes = _nodes(machines, ranks, stride)
    in_a_node = math.ceil(ranks / nodes) - 1
    tree = in_a_node * NVLINK_HOP + math.log2(nodes) * NETWORK_HOP
    return 2 * min(ring_hops(machines, ranks, stride), tree)


def _nodes(machines: Machines, ranks: int, stride: int) -> int:
    """Machines over which a group is spread."""
    return min(ranks, math.ceil(ranks * stride / machines.per_node))


def describe_simulation(simulation: Simulation) -> list[str]:
    """The step's time and what it is made of, a line each."""
    compute, steps, sent = simulation.compute, simulation.micro_steps, simulation.sent
    parts = [
        f"products {compute.products * steps:.3g}",
        f"attention {compute.attention * steps:.3g}",
        f"head {compute.head * steps:.3g}",
        f"other operators {compute.rest * steps:.3g}",
        f"{'Muon' if simulation.plan.muon else 'AdamW'} {simulation.update:.3g}",
    ]
    kinds = [
        f"{name.replace('_', '-')} {kind.exposed:.3g} of {kind.seconds:.3g}"
        for name, kind in sent.items()
        if kind.seconds
    ]
    seconds, exposed = simulation.seconds, simulation.exposed
    return [
        f"about {seconds:.3g} s a step ({', '.join(parts)}, exposed communication {exposed:.3g})",
        f"exposed communication {exposed / seconds:.1%} of the step"
        + (f": {', '.join(kinds)} s" if kinds else ""),
        f"{percentage(simulation.mfu)} MFU, {simulation.tokens_per_gpu:,.0f} tokens/s a GPU",
    ]


def assumptions(simulation: Simulation) -> list[tuple[str, str, str]]:
    """All that a simulated step rests on, as a table: what, its value, and where it is from."""
    plan, program = simulation.plan, simulation.program
    gpu, config = plan.machines.accelerator, plan.config
    peak, memory = gpu.peak_flops(plan.precision), gpu.memory_bandwidth
    assert peak is not None  # without them nothing is simulated
    assert memory is not None
    links = f"{REACHED_LINKS:.0%} of"
    compiled = compiled_share(config.model)
    blocks = f"move {compiled:.0%} of the bytes that single operators do"
    if not config.training.compile:
        blocks = "operator by operator, or as training.compile and the device have them"
    hidden = {True: "beside the computation", False: "exposed"}
    return [
        ("assumed", "value", "from"),
        ("peak", f"{peak / 1e12:,.0f} TFLOP/s in {plan.precision}", "data sheet"),
        (
            "matrix products",
            f"{gpu.reached_products:.0%} of the peak, half of that at sums of {HALF_DEPTH} terms",
            gpu.products_from,
        ),
        (
            "attention",
            f"{gpu.reached_attention:.0%} of the peak at {_FULL_HEAD} columns a head, less at "
            "fewer by proportion",
            "FlashAttention-2 and -3, abstracts",
        ),
        ("memory", f"{REACHED_BANDWIDTH:.0%} of {memory / 1e9:,.0f} GB/s", "assumption"),
        ("smallest kernel", f"{SHORTEST * 1e6:.0f} us", "assumption"),
        ("blocks' norms and elementwise", blocks, "inductor's count on a CPU"),
        (
            "links in a machine",
            f"{links} {gpu.node_bandwidth / 1e9:,.0f} GB/s, {NVLINK_HOP * 1e6:.1f} us a step of a "
            "ring or tree",
            "data sheet, NCCL's tuning",
        ),
        (
            "network",
            f"{links} {gpu.network_bandwidth / 1e9:,.1f} GB/s a GPU, those of a machine side by "
            f"side, {NETWORK_HOP * 1e6:.0f} us a step of a ring "
            "or tree",
            "DGX, NCCL's tuning",
        ),
        ("gradients", hidden[program.hides_gradients], "parallel.overlap_comm from stage 2 on"),
        (
            "weights",
            hidden[program.hides_weights],
            "DeepSpeed: gathered after the update, at stage 3 before their use",
        ),
        (
            "tensor-parallel communication",
            f"{1 - program.hides_tensor_parallel:.0%} exposed",
            "assumption",
        ),
        (
            "AdamW",
            f"{BYTES_OF_ADAMW} bytes a parameter of a rank's share, in fp32",
            "its operators",
        ),
        *_assumed_of_muon(plan),
        ("pipeline parallelism", "none", "this project has none"),
        (
            "data, evaluation, checkpoints, logs, stragglers",
            "never waited for",
            "assumption",
        ),
    ]


def _assumed_of_muon(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.muon is None:
        return []
    steps = (
        f"{BYTES_OF_MUON} bytes a parameter of a rank's share, in fp32, and iterations in bf16 on "
        f"{len(plan.muon.matrices)} matrices, of the rank with most to do"
    )
    return [("Muon", steps, "its operators")]
