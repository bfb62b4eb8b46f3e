"""How the global batch grows, and which samples a step has, as pure functions of the step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megaegpt.config.ranges import BatchSize, PositiveInt


@dataclass(frozen=True)
class BatchRampConfig:
    """A global batch that starts small: early steps learn as much from fewer samples."""

    start: BatchSize | None = None
    """Samples of the first steps. null: every step has global_batch_size."""
    increment: BatchSize = 1
    """Samples the global batch grows by."""
    steps: PositiveInt = 100
    """Steps between one size and the next."""


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch of every step; step s has the samples that follow those of the steps before.

    Args:
        final: samples of a step after the ramp.
        ramp: how it gets there; the defaults have no ramp.
        offset: samples that a run has drawn more, or less, than by this schedule: with other sizes,
            before it went on with these.
    """

    final: int
    ramp: BatchRampConfig = BatchRampConfig()
    offset: int = 0

    def going_on(self, step: int, sample: int) -> BatchSchedule:
        """The same sizes, with ``sample`` as the number of the first sample of step ``step``."""
        return dataclasses.replace(self, offset=self.offset + sample - self.samples_before(step))

    @property
    def ramp_steps(self) -> int:
        """Steps that have fewer samples than ``final``."""
        return self._sizes_below() * self.ramp.steps

    def size(self, step: int) -> int:
        """Samples of step ``step``, counted from 0."""
        if self.ramp.start is None:
            return self.final
        return min(self.final, self.ramp.start + step // self.ramp.steps * self.ramp.increment)

    def samples_before(self, step: int) -> int:
        """Samples of the steps 0 .. ``step - 1`` together: the number of the step's first one."""
        if self.ramp.start is None:
            return self.offset + step * self.final
        small = min(step, self.ramp_steps)
        whole, rest = divmod(small, self.ramp.steps)
        at_start = small * self.ramp.start
        grown = self.ramp.increment * (self.ramp.steps * whole * (whole - 1) // 2 + rest * whole)
        return self.offset + at_start + grown + (step - small) * self.final

    def sizes(self) -> list[int]:
        """Every size in the order of the steps."""
        if self.ramp.start is None:
            return [self.final]
        return [*range(self.ramp.start, self.final, self.ramp.increment), self.final]

    def _sizes_below(self) -> int:
        if self.ramp.start is None:
            return 0
        return max(0, -(-(self.final - self.ramp.start) // self.ramp.increment))
