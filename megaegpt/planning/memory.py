"""A rank's memory in training, known before anything is allocated.

Activations are those of a traced micro-batch (``memory_trace``). What ZeRO holds beside them
follows from DeepSpeed 0.19.8's optimizers, and is held against measured runs by the tests.

Not counted: the CUDA context and libraries' workspaces, fragmentation, attention dropout's masks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.deepspeed_config import deepspeed_config
from megaegpt.config.parallel import effective_zero_stage
from megaegpt.planning.memory_trace import MicroStep, trace_micro_step
from megaegpt.planning.muon_share import MuonShare, share_of_muon
from megaegpt.precision import DTYPES, Precision

_REDUCED_AT_ONCE = 500_000_000
"""Gradient elements that DeepSpeed reduces at once without a bucket (stage 0, bf16 stage 1)."""


_LIVE, _SUB_GROUP = 1_000_000_000, 1_000_000_000
"""Parameters that DeepSpeed's stage 3 leaves whole until they are used again, and those of a rank
that it updates at once."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a rank at the moment of a step when they are most."""

    weights: int = 0
    """Parameters in the precision of the computation."""
    optimizer: int = 0
    """The optimizer's moments, and fp32 weights where the computation has others."""
    gradients: int = 0
    """Gradients that are kept between micro-steps and until the update."""
    buffers: int = 0
    """Gradients in the course of their reduction over data-parallel ranks."""
    gathered: int = 0
    """Whole parameters that ZeRO stage 3 has beside a rank's parts of all of them."""
    frozen: int = 0
    """Weights of the encoder and of frozen parts."""
    activations: int = 0
    """Values of a micro-batch kept for the backward pass, and temporary ones at the peak."""

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = {name: size for name, size in dataclasses.asdict(self).items() if size}
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"about {self.total / 2**30:.2f} GiB a rank ({listed})"


def estimate_memory(
    config: RunConfig,
    dp_size: int,
    precision: Precision,
    encoder: ModelConfig | None = None,
    device_type: str = "cuda",
    sample_tokens: int | None = None,
) -> MemoryEstimate:
    """Peak of a rank's tensors over a training step.

    Args:
        config: the run; ``model.encoder.source`` is not read.
        dp_size: data-parallel ranks.
        precision: what ``auto`` has become.
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        device_type: ``cuda`` or ``cpu``, which compute in different portions.
        sample_tokens: of the longest sample there is; None: as long as the model's samples are.
    """
    step = trace_rank(config, dp_size, precision, encoder, device_type, sample_tokens)
    return peak_of_step(config, dp_size, precision, step)


def trace_rank(
    config: RunConfig,
    dp_size: int,
    precision: Precision,
    encoder: ModelConfig | None = None,
    device_type: str = "cuda",
    sample_tokens: int | None = None,
) -> MicroStep:
    """A rank's micro-step with gradients that come and go as ZeRO lets them; arguments as above."""
    kept = keeps_gradients(config, dp_size, precision)
    return trace_micro_step(
        config, precision, encoder, device_type, kept, sample_tokens=sample_tokens
    )


def keeps_gradients(config: RunConfig, dp_size: int, precision: Precision) -> bool:
    """Whether a micro-step's gradients stay with their parameters until its backward pass ends."""
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    several = config.gradient_accumulation(dp_size) > 1
    return stage < 2 and (precision != "fp32" or not several)


def peak_of_step(
    config: RunConfig, dp_size: int, precision: Precision, step: MicroStep
) -> MemoryEstimate:
    """:func:`estimate_memory` from a micro-step that has been traced."""
    return max(_moments(config, dp_size, precision, step), key=lambda moment: moment.total)


def held_in_backward(config: RunConfig, dp_size: int, precision: Precision, step: MicroStep) -> int:
    """Bytes that lie beside weights and activations while these are most."""
    moment = _moments(config, dp_size, precision, step)[0]
    return moment.optimizer + moment.gradients + moment.buffers


def _moments(
    config: RunConfig, dp_size: int, precision: Precision, step: MicroStep
) -> list[MemoryEstimate]:
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    several = config.gradient_accumulation(dp_size) > 1
    return _Zero(config, dp_size, precision, stage, several, step).moments()


@dataclass(frozen=True)
class _Zero:
    """The memory of DeepSpeed's optimizers; n: this rank's parameters."""

    config: RunConfig
    dp_size: int
    precision: Precision
    stage: int
    several: bool
    """More than one micro-step, so that gradients exist while activations do."""
    passed: MicroStep

    @property
    def replicas(self) -> int:
        """Ranks among which ZeRO partitions."""
        return self.dp_size * self.config.parallel.context_parallel_size

    def moments(self) -> list[MemoryEstimate]:
        """The candidates for the peak: in the backward pass, and when gradients are reduced."""
        n = self.passed.parameters
        item = DTYPES[self.precision].itemsize
        if self.stage == 3:
            return self._stage_3(n, item)
        shared = 1 if self.stage == 0 else self.replicas
        muon = share_of_muon(self.config, self.dp_size, self.precision, self.passed.muon)
        states = (8 if self.stage == 0 else 12) * n
        states -= 4 * muon.parameters if muon else 0  # which has one moment
        base = MemoryEstimate(
            weights=item * n, optimizer=states // shared, frozen=self.passed.frozen
        )
        moments = self._before_the_update(base, n, item)
        if muon:
            moments.append(self._muon_update(base, n, muon, shared))
        return moments

    def _before_the_update(self, base: MemoryEstimate, n: int, item: int) -> list[MemoryEstimate]:
        if self.stage == 2:
            return self._stage_2(base, n, item)
        if self.precision == "fp32":
            return self._unpartitioned_fp32(base, n)
        gradients, once = 4 * n, min(n, _REDUCED_AT_ONCE)
        return [
            dataclasses.replace(base, gradients=gradients, activations=self.passed.peak),
            # The micro-step's own gradients, a flat fp32 copy, and one in the precision of the wire
            dataclasses.replace(base, gradients=gradients + item * n, buffers=(4 + item) * once),
        ]

    def _muon_update(
        self, base: MemoryEstimate, n: int, muon: MuonShare, shared: int
    ) -> MemoryEstimate:
        """Where there are partitions, with the directions of one."""
        flat = 0 if self.stage == 0 else 4 * muon.parameters // shared
        gradients = 4 * n if self.stage == 0 else 8 * n // shared  # and flat once more
        return dataclasses.replace(base, gradients=gradients, buffers=flat + muon.working)

    def _unpartitioned_fp32(self, base: MemoryEstimate, n: int) -> list[MemoryEstimate]:
        accumulated = 4 * n if self.several else 0
        if self.stage == 0:
            in_backward, reducing = 0, 4 * min(n, _REDUCED_AT_ONCE)
        else:
            in_backward = 4 * self._bucket(n)
            reducing = in_backward + 8 * self.passed.largest_parameter
        peak = self.passed.peak
        return [
            dataclasses.replace(base, gradients=accumulated, buffers=in_backward, activations=peak),
            dataclasses.replace(base, gradients=4 * n, buffers=reducing),
        ]

    def _stage_2(self, base: MemoryEstimate, n: int, item: int) -> list[MemoryEstimate]:
        part, bucket = 4 * n // self.replicas, self._bucket(n)
        early = self.several or bucket < n  # reduced gradients exist before the pass has ended
        buckets = item * bucket * (2 if self.config.parallel.overlap_comm else 1)
        widened = 4 * self.passed.largest_parameter if item < 4 else 0
        left = int(self.passed.kept * (1 - bucket / n))  # when the first full bucket is reduced
        return [
            dataclasses.replace(
                base,
                gradients=part if early else 0,
                buffers=buckets,
                activations=self.passed.peak,
            ),
            dataclasses.replace(base, gradients=part, buffers=buckets + widened, activations=left),
        ]

    def _stage_3(self, n: int, item: int) -> list[MemoryEstimate]:
        """In the passes, at the update, and while tasks are scored or a sample is generated, for
        which a rank has the whole model.

        DeepSpeed keeps what it has gathered until it is used again, up to a number of parameters.
        """
        offload, part = self.config.parallel.offload, -(-n // self.replicas)
        largest = self.passed.largest_parameter
        whole = item * n + self.passed.frozen_parts
        base = MemoryEstimate(
            weights=0 if offload == "parameters" else whole // self.replicas,
            optimizer=0 if offload != "none" else 12 * part,
            gradients=0 if offload != "none" else 4 * part,
            buffers=item * self._bucket(n),
            frozen=self.passed.frozen - self.passed.frozen_parts,
        )
        at_once = 0 if offload != "none" else 4 * min(part, _SUB_GROUP)  # a copy for the optimizer
        moments = [
            dataclasses.replace(
                base,
                gathered=min(whole, item * (most_whole(self.config) + largest)),
                activations=self.passed.peak,
            ),
            dataclasses.replace(base, gradients=base.gradients + at_once),
        ]
        if self.config.data.tasks or self.config.generation.max_new_tokens:
            moments.append(dataclasses.replace(base, gathered=whole))
        return moments

    def _bucket(self, n: int) -> int:
        options = deepspeed_config(self.config, self.dp_size, self.precision, n)
        return min(n, int(options["zero_optimization"]["reduce_bucket_size"]))


def most_whole(config: RunConfig) -> int:
    """Parameters that ZeRO stage 3 leaves whole at once."""
    raw = config.deepspeed.get("zero_optimization", {})
    return int(raw.get("stage3_max_live_parameters", _LIVE))
