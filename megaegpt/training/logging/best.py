"""The best validation loss of a run: whether the newest is it, and how long ago it was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from megaegpt.errors import CheckpointError
from megaegpt.json_files import conform


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

        A loss that is not finite is never the best.
        """
        if step <= self.counted:
            return
        self.counted = step
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            self.loss, self.step, self.without = loss, step, 0
        else:
            self.without += 1

    def lost_patience(self, patience: int | None) -> bool:
        """Whether ``patience`` evaluations have passed without a better one (None: never)."""
        return patience is not None and self.without >= patience

    def state(self) -> dict[str, Any]:
        """For :meth:`restored`."""
        return asdict(self)

    @staticmethod
    def restored(state: Any) -> BestLoss:
        """Go on from a checkpoint's state. In one of an earlier version the best loss may be no
        finite number, which is none.

        Raises:
            CheckpointError: it is no such state.
        """
        loss = state.get("loss") if isinstance(state, dict) else None
        if isinstance(loss, float) and not math.isfinite(loss):
            state = {**state, "loss": None}
        return conform(state, BestLoss, "the checkpoint's best loss", error=CheckpointError)
