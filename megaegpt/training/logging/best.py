"""The best validation loss of a run: whether the newest is it, and how long ago it was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class BestLoss:
    """Counts evaluations; a pure function of their losses, so that a resumed run agrees.

    Its state is a dictionary of JSON values: a checkpoint that precedes its step's evaluation holds
    the state without it, and the evaluation is counted again on resuming.
    """

    loss: float | None = None
    """Nats per token; None before the first evaluation with a finite loss."""
    step: int = 0
    """Steps done when it was measured."""
    counted: int = 0
    """Steps done at the latest evaluation that was counted."""
    without: int = 0
    """Evaluations since the best."""

    def count(self, step: int, loss: float) -> None:
        """Take note of an evaluation after ``step`` steps, once.

        A loss that is not finite is never the best, and no obstacle to a later one: checkpoints
        of earlier versions can hold one.
        """
        if step <= self.counted:
            return
        self.counted = step
        beaten = self.loss is None or not math.isfinite(self.loss) or loss < self.loss
        if math.isfinite(loss) and beaten:
            self.loss, self.step, self.without = loss, step, 0
        else:
            self.without += 1

    def lost_patience(self, patience: int | None) -> bool:
        """Whether ``patience`` evaluations have passed without a better one (None: never)."""
        return patience is not None and self.without >= patience

    def state(self) -> dict[str, Any]:
        """For ``BestLoss(**state)``."""
        return asdict(self)
