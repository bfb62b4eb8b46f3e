"""The number that ``training.micro_batch_size: auto`` stands for, by the plan of a rank's memory.

It changes nothing of what is learnt from: a step's samples and their order are the same with any.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.planning.memory import estimate_memory
from megaegpt.precision import Precision

CPU_TOKENS = 2048
"""Tokens of a micro-batch beyond which a CPU gains nothing: from a few hundred rows on a product's
speed no longer depends on them (docs/benchmarks.md), and more samples only take more memory."""


@dataclass(frozen=True)
class MemoryLimit:
    """What a rank's tensors may take."""

    size: int
    """Bytes."""
    source: str
    """What it is of, in words."""
    most_tokens: int | None = None
    """Of a micro-batch, where more are of no use."""


@dataclass(frozen=True)
class MicroBatchChoice:
    """A number for ``training.micro_batch_size``, and what it follows from."""

    size: int
    predicted: int
    """Bytes of a rank's step by the plan."""
    limit: MemoryLimit
    bound: str
    """Why it is no larger number."""
    measured: int | None = None
    """Bytes of a dry step on the device."""

    def __str__(self) -> str:
        fits = "takes" if self.predicted <= self.limit.size else "does not fit: it takes"
        dry = "" if self.measured is None else f" and {gib(self.measured)} in a dry step"
        return (
            f"training.micro_batch_size=auto is {self.size}: by the plan a step {fits} "
            f"{gib(self.predicted)} a rank{dry}, which may have {gib(self.limit.size)} "
            f"({self.limit.source}); {self.bound}"
        )


def possible_sizes(config: RunConfig, dp_size: int) -> list[int]:
    """The micro-batches with which every step of a run is whole micro-steps, ascending."""
    ramp = config.training.batch_ramp
    on_the_way = () if ramp.start is None else (ramp.start, ramp.increment)
    share = math.gcd(config.training.global_batch_size, *on_the_way) // dp_size
    low = [n for n in range(1, math.isqrt(share) + 1) if share % n == 0]
    return sorted({*low, *(share // n for n in low)})


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """The run with a number in place of ``auto``."""
    training = dataclasses.replace(config.training, micro_batch_size=size)
    return dataclasses.replace(config, training=training)


def largest_that_fits(
    config: RunConfig,
    dp_size: int,
    precision: Precision,
    limit: MemoryLimit,
    encoder: ModelConfig | None = None,
    device_type: str = "cuda",
    sample_tokens: int | None = None,
) -> MicroBatchChoice:
    """The largest of :func:`possible_sizes` within ``limit``, by bisection; the smallest where none
    is. Other arguments as for :func:`~megaegpt.planning.memory.estimate_memory`.
    """
    columns = sample_tokens or config.model.sample_len
    tokens = math.inf if limit.most_tokens is None else limit.most_tokens
    possible = possible_sizes(config, dp_size)
    sizes = [n for n in possible if n == 1 or n * columns <= tokens]

    def predict(size: int) -> int:
        run = with_micro_batch(config, size)
        return estimate_memory(run, dp_size, precision, encoder, device_type, sample_tokens).total

    predicted = {sizes[0]: predict(sizes[0])}
    fitting, above = 0, len(sizes)
    if predicted[sizes[0]] > limit.size:
        return MicroBatchChoice(sizes[0], predicted[sizes[0]], limit, "there is no smaller number")
    while above - fitting > 1:
        middle = (fitting + above) // 2
        predicted[sizes[middle]] = predict(sizes[middle])
        if predicted[sizes[middle]] <= limit.size:
            fitting = middle
        else:
            above = middle
    best = sizes[fitting]
    if above < len(sizes):
        bound = f"{sizes[above]} would take {gib(predicted[sizes[above]])}"
    elif len(sizes) < len(possible):
        bound = f"more than {limit.most_tokens:,} tokens are no faster on a CPU"
    else:
        bound = "a rank has no more samples in a step"
    return MicroBatchChoice(best, predicted[best], limit, bound)


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"
