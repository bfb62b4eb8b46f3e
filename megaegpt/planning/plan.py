"""The memory, operations, communication and time of a run on given machines, without them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.deepspeed_keys import without_stage_3_keys
from megaegpt.config.parallel import effective_zero_stage
from megaegpt.config.validation import find_problems, validate
from megaegpt.planning.hardware import USABLE_MEMORY, Accelerator
from megaegpt.planning.memory import MemoryEstimate, most_whole, peak_of_step, trace_rank
from megaegpt.planning.memory_trace import MicroStep
from megaegpt.planning.micro_batch import (
    CPU_TOKENS,
    MemoryLimit,
    MicroBatchChoice,
    largest_that_fits,
    with_micro_batch,
)
from megaegpt.planning.muon_share import MuonShare, operations, share_of_muon
from megaegpt.planning.summary import ModelSize, measure_model
from megaegpt.precision import DTYPES, Precision

STAGE_1_MAY_COST = 0.05
"""Share of a step that ZeRO stage 2 must save by the plan to be recommended where both fit. What
the plan does not see is in favour of stage 1: sums over ranks in fp32, and 600 operators fewer in a
step of 12 blocks, of which the device waits for some."""

_RECOMPUTED_WORK = {"none": 1.0, "selective": 1.0, "full": 4 / 3}
"""Operations over those of the model: ``full`` makes every forward pass twice."""


@dataclass(frozen=True)
class Machines:
    """Equal GPUs in equal machines."""

    accelerator: Accelerator
    gpus: int
    """GPUs of all machines together."""
    per_node: int

    def bandwidth(self, ranks: int, stride: int = 1) -> float:
        """Bytes per second that a rank sends to its neighbour of a group.

        Each GPU of a machine has its own way to the network, and NCCL makes as many rings as the
        group has ranks in a machine, which use these ways side by side.

        Args:
            ranks: of the group.
            stride: between the numbers of two neighbours.
        """
        accelerator = self.accelerator
        if ranks * stride <= self.per_node:
            return accelerator.node_bandwidth
        rings = max(1, self.per_node // stride)
        return min(accelerator.node_bandwidth, accelerator.network_bandwidth * rings)

    def __str__(self) -> str:
        nodes = -(-self.gpus // self.per_node)
        machines = "1 machine" if nodes == 1 else f"{nodes} machines"
        return f"{self.gpus} x {self.accelerator.name} in {machines}"


@dataclass(frozen=True)
class Communication:
    """Bytes of the tensors that go through each kind of collective, per rank and step."""

    tensor_parallel: int
    """Activations and their gradients, summed over the ranks that share a model."""
    sequence_parallel: int
    """The same where each of these ranks has the sum for its tokens only, or gathers all of it."""
    context_parallel: int
    """Gathered from the ranks that share samples, scattered over them or exchanged with them."""
    gradients: int
    """Summed over the replicas of the weights: data- and context-parallel ranks."""
    scattered: int
    """The same where each rank has the sum for its parts only, as at ZeRO stage 3."""
    weights: int
    """Gathered from the replicas that have updated them; at ZeRO stage 3, for every pass."""
    gathered_matrices: int = 0
    """Under Muon, those that a rank steps, gathered from the ranks that share a model."""
    cut_matrices: int = 0
    """The same, of those that borders of partitions cut, exchanged between the replicas that have
    pieces of them."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, its parts one after the other."""

    compute: float
    """As if everything were trained."""
    tensor_parallel: float
    context_parallel: float
    gradients: float
    weights: float
    matrices: float = 0.0
    """Muon's, gathered and exchanged."""

    @property
    def total(self) -> float:
        """Of all parts; ``parallel.overlap_comm`` can hide gradients behind the computation."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """A run on machines."""

    config: RunConfig
    machines: Machines
    precision: Precision
    size: ModelSize
    memory: MemoryEstimate
    communication: Communication
    time: StepTime | None
    """None where the speed of the computation is not known, or a CPU has a part in it."""
    micro_batch: MicroBatchChoice | None = None
    """Where the configuration has ``auto``."""
    muon: MuonShare | None = None
    """None under AdamW."""

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.machines.gpus // self.config.parallel.ranks_of_a_sample

    @property
    def replicas(self) -> int:
        """Data- and context-parallel ranks, which hold the same weights."""
        return self.dp_size * self.config.parallel.context_parallel_size

    @property
    def tokens(self) -> int:
        """Predicted tokens of a step (of the last ones, if the batch grows)."""
        return self.config.training.global_batch_size * self.config.model.sample_len

    @property
    def fits(self) -> bool:
        """Whether a rank's memory holds it."""
        return self.memory.total <= USABLE_MEMORY * self.machines.accelerator.memory

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks."""
        return self.tokens / self.time.total if self.time else None


def make_plan(
    config: RunConfig,
    machines: Machines,
    encoder: ModelConfig | None = None,
    *,
    flops: float | None = None,
    efficiency: float = 0.5,
) -> Plan:
    """Count and estimate.

    Args:
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        flops: peak of a GPU per second, where the table does not know it.
        efficiency: share of the peak that the computation reaches.

    Raises:
        ConfigError: the configuration cannot run on so many GPUs.
    """
    validate(config, machines.gpus)
    accelerator = machines.accelerator
    precision = accelerator.precision(config.training.precision)
    dp_size = machines.gpus // config.parallel.ranks_of_a_sample
    choice = None
    if config.training.micro_batch_size == "auto":
        kind, limit = accelerator.device_type, _limit(accelerator)
        choice = largest_that_fits(config, dp_size, precision, limit, encoder, kind)
        config = with_micro_batch(config, choice.size)
    size = measure_model(config, encoder)
    step = trace_rank(config, dp_size, precision, encoder, accelerator.device_type)
    communication = count_communication(config, dp_size, precision, step)
    muon = share_of_muon(config, dp_size, precision, step.muon)
    memory = peak_of_step(config, dp_size, precision, step)
    peak = flops or accelerator.peak_flops(precision)
    tokens = config.training.global_batch_size * config.model.sample_len
    work = size.flops_per_token * tokens / machines.gpus
    work *= _RECOMPUTED_WORK[config.training.activation_checkpointing]
    work += sum(map(operations, muon.matrices)) if muon else 0
    known = peak is not None and config.parallel.offload == "none"
    seconds = work / (peak * efficiency) if peak else 0.0
    time = _step_time(config, machines, communication, seconds) if known else None
    return Plan(config, machines, precision, size, memory, communication, time, choice, muon)


def _limit(accelerator: Accelerator) -> MemoryLimit:
    size = int(USABLE_MEMORY * accelerator.memory)
    tokens = CPU_TOKENS if accelerator.device_type == "cpu" else None
    return MemoryLimit(size, f"{USABLE_MEMORY:.0%} of {accelerator.name}", tokens)


def count_communication(
    config: RunConfig, dp_size: int, precision: Precision, step: MicroStep
) -> Communication:
    """Tensors that a rank hands to collectives in a step; single numbers are not counted.

    DeepSpeed 0.19.8 sums whole buckets of gradients over all replicas, at stage 2 after
    every micro-step in the weights' type and otherwise once a step in fp32, and gathers the updated
    weights from stage 1 on. Stage 3 scatters gradients, and gathers weights for every forward and
    backward pass; once a micro-step, if all may stay whole so long.
    """
    micro_steps = config.gradient_accumulation(dp_size)
    replicas = dp_size * config.parallel.context_parallel_size
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    weights = step.parameters * DTYPES[precision].itemsize
    gradients = weights * micro_steps if stage == 2 else step.parameters * torch.float32.itemsize
    scattered = 0
    if stage == 3:
        gradients, scattered = 0, weights * micro_steps
        whole = weights + step.frozen_parts
        stays = whole <= most_whole(config) * DTYPES[precision].itemsize
        again = 3 if config.training.activation_checkpointing == "full" else 2
        weights = whole * micro_steps * (1 if stays else again)
    muon = share_of_muon(config, dp_size, precision, step.muon)
    return Communication(
        tensor_parallel=step.summed * micro_steps,
        sequence_parallel=step.cut * micro_steps,
        context_parallel=step.shared * micro_steps,
        gradients=gradients if replicas > 1 else 0,
        scattered=scattered if replicas > 1 else 0,
        weights=weights if stage > 0 and replicas > 1 else 0,
        gathered_matrices=muon.gathered if muon else 0,
        cut_matrices=muon.exchanged if muon else 0,
    )


def _step_time(
    config: RunConfig, machines: Machines, communication: Communication, compute: float
) -> StepTime:
    """Rings at the data sheets' speed: a sum sends every byte 2 (p - 1) / p times, a gathering or
    scattering half as often. Pieces of matrices go by a GPU's own way to the network.
    """
    tp = config.parallel.tensor_parallel_size
    cp = config.parallel.context_parallel_size
    replicas = machines.gpus // tp
    within = 2 * communication.tensor_parallel + communication.sequence_parallel
    inside, across = machines.bandwidth(tp), machines.bandwidth(replicas, stride=tp)
    accelerator, in_one = machines.accelerator, machines.gpus <= machines.per_node
    directly = accelerator.node_bandwidth if in_one else accelerator.network_bandwidth
    return StepTime(
        compute=compute,
        tensor_parallel=(tp - 1) / tp * within / inside,
        context_parallel=(cp - 1)
        / cp
        * communication.context_parallel
        / machines.bandwidth(cp, stride=tp),
        gradients=(replicas - 1)
        / replicas
        * (2 * communication.gradients + communication.scattered)
        / across,
        weights=(replicas - 1) / replicas * communication.weights / across,
        matrices=(tp - 1) / tp * communication.gathered_matrices / inside
        + communication.cut_matrices / directly,
    )


def known_seconds(plan: Plan) -> float:
    """Of a step; infinite where they are not known, so that such plans are ranked last."""
    return plan.time.total if plan.time else math.inf


def alternatives(
    plan: Plan,
    replan: Callable[[RunConfig], Plan],
    seconds: Callable[[Plan], float] = known_seconds,
) -> list[Plan]:
    """The largest micro-batch that fits, for tensor-parallel sizes inside a machine (with sequence
    parallelism) and kinds of recomputation, at the ZeRO stage that suits each: the fastest first,
    which is what the plan recommends. The global batch, and so what is learnt, stays. What costs
    more is left out where a rank's whole batch fits without it and without offloading. Behind them
    come those that do not fit even with one sample a micro-batch, the smallest first.

    Args:
        replan: :func:`make_plan` with everything given but the configuration.
        seconds: of a plan's step, by which they are ranked.
    """
    found: list[Plan] = []
    too_large: list[Plan] = []
    for tp in _tensor_parallel_sizes(plan):
        parallel = dataclasses.replace(plan.config.parallel, sequence_parallel=tp > 1)
        cut = dataclasses.replace(plan, config=dataclasses.replace(plan.config, parallel=parallel))
        for recompute in ("none", "selective", "full"):
            best = _best_stage(cut, tp, recompute, replan, seconds)
            if best is None:
                continue
            if not best.fits:
                too_large.append(best)
                continue
            found.append(best)
            offloads = best.config.parallel.offload != "none"
            if not offloads and best.config.gradient_accumulation(best.dp_size) == 1:
                break
        if found and _saves_no_memory(found[-1].config):
            break
    return sorted(found, key=seconds) + sorted(too_large, key=lambda plan: plan.memory.total)


def _saves_no_memory(config: RunConfig) -> bool:
    """By recomputation or offloading."""
    recompute = config.training.activation_checkpointing
    return recompute == "none" and config.parallel.offload == "none"


def _tensor_parallel_sizes(plan: Plan) -> Iterator[int]:
    tp = 1
    while tp <= plan.machines.per_node:
        yield tp
        tp *= 2


def impossible_sizes(plan: Plan) -> dict[int, str]:
    """Tensor-parallel sizes inside a machine that the run cannot have, and why."""
    problems = {}
    for tp in _tensor_parallel_sizes(plan):
        parallel = dataclasses.replace(
            plan.config.parallel, tensor_parallel_size=tp, sequence_parallel=tp > 1
        )
        training = dataclasses.replace(plan.config.training, micro_batch_size=1)
        config = dataclasses.replace(plan.config, parallel=parallel, training=training)
        if found := find_problems(config, plan.machines.gpus):
            problems[tp] = found[0].message
    return problems


def alternatives_over_context(
    plan: Plan,
    replan: Callable[[RunConfig], Plan],
    seconds: Callable[[Plan], float] = known_seconds,
) -> list[Plan]:
    """:func:`alternatives` on as few context-parallel ranks, from the plan's number on, as let any
    of them fit: a sample that is too long for one rank is shared.
    """
    found: list[Plan] = []
    while True:
        found = alternatives(plan, replan, seconds) or found  # some samples cannot be shared so
        parallel = plan.config.parallel
        if any(other.fits for other in found) or plan.machines.gpus < 2 * (
            cp := parallel.context_parallel_size
        ):
            return found
        parallel = dataclasses.replace(parallel, context_parallel_size=2 * cp)
        config = dataclasses.replace(plan.config, parallel=parallel)
        plan = dataclasses.replace(plan, config=config)


def recommend(plan: Plan, replan: Callable[[RunConfig], Plan]) -> Plan | None:
    """The ZeRO stage and the micro-batch for a run whose tensor-parallel size and recomputation
    stay; None if a single sample does not fit. Arguments as for :func:`alternatives`.
    """
    config = plan.config
    recompute = config.training.activation_checkpointing
    best = _best_stage(plan, config.parallel.tensor_parallel_size, recompute, replan, known_seconds)
    return best if best is not None and best.fits else None


def _best_stage(
    plan: Plan,
    tp: int,
    recompute: str,
    replan: Callable[[RunConfig], Plan],
    seconds: Callable[[Plan], float],
) -> Plan | None:
    """At ZeRO stage 1, which sums gradients in fp32, sends them once a step and starts half as many
    operators; at stage 2 where that fits more, or is clearly faster by the plan; at stage 3 where
    nothing else fits, offloading as the plan does where that does not fit without. None if the run
    cannot be cut so.
    """
    first = _largest_batch(plan, tp, recompute, 1, replan)
    if first is None:  # such as a batch that this stage cannot be cut into
        return _at_stage_3(plan, tp, recompute, replan)
    if first.fits and first.config.gradient_accumulation(first.dp_size) == 1:
        return first
    second = _largest_batch(plan, tp, recompute, 2, replan)
    if not first.fits and (second is None or not second.fits):
        return _at_stage_3(plan, tp, recompute, replan) or second or first
    if second is None or not (first.fits and second.fits):
        return first if second is None or first.fits else second
    return second if seconds(second) < (1 - STAGE_1_MAY_COST) * seconds(first) else first


def _at_stage_3(
    plan: Plan, tp: int, recompute: str, replan: Callable[[RunConfig], Plan]
) -> Plan | None:
    on_gpus = _largest_batch(plan, tp, recompute, 3, replan)
    offload = plan.config.parallel.offload
    if offload == "none" or (on_gpus is not None and on_gpus.fits):
        return on_gpus
    return _largest_batch(plan, tp, recompute, 3, replan, offload) or on_gpus


def _largest_batch(
    plan: Plan,
    tp: int,
    recompute: str,
    stage: int,
    replan: Callable[[RunConfig], Plan],
    offload: str = "none",
) -> Plan | None:
    """By bisection over powers of two; a micro-batch of one, which does not fit, where none does.
    None if the run cannot be cut so.
    """
    configs = (
        _changed(plan.config, tp, recompute, stage, 2**power, offload)
        for power in itertools.count()
    )
    runs = itertools.takewhile(lambda c: not find_problems(c, plan.machines.gpus), configs)
    possible = list(runs)
    best = None
    while possible:
        middle = len(possible) // 2
        candidate = replan(possible[middle])
        if candidate.fits:
            best, possible = candidate, possible[middle + 1 :]
        else:
            possible = possible[:middle]
            if best is None and not possible:
                best = candidate
    return best


def _changed(
    config: RunConfig, tp: int, recompute: Any, stage: int, micro_batch: int, offload: Any
) -> RunConfig:
    replace = dataclasses.replace
    parallel = replace(config.parallel, tensor_parallel_size=tp, zero_stage=stage, offload=offload)
    if stage != 3:
        config = replace(config, deepspeed=without_stage_3_keys(config.deepspeed))
    training = replace(
        config.training, micro_batch_size=micro_batch, activation_checkpointing=recompute
    )
    return replace(config, parallel=parallel, training=training)
