"""Which gradient norms stand out from those of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megaegpt.config.training import SpikeGuardConfig
from megaegpt.errors import CheckpointError
from megaegpt.json_files import conform


class SpikeGuard:
    """Compares each gradient norm with the median of the last ``window`` ones.

    It finds nothing before it has as many. The norms of spikes are among those it compares with, so
    that a level that stays becomes the usual one.
    """

    def __init__(self, config: SpikeGuardConfig) -> None:
        self._factor, self._window = config.factor or math.inf, config.window
        self._norms: deque[float] = deque(maxlen=config.window)

    @property
    def is_on(self) -> bool:
        """Whether norms are compared at all."""
        return math.isfinite(self._factor)

    @property
    def median(self) -> float:
        """Of the norms that the next one is compared with; nan before there are enough."""
        return statistics.median(self._norms) if len(self._norms) == self._window else math.nan

    def is_spike(self, norm: float) -> bool:
        """Whether a step's norm stands out; it counts among those before the next step. One that is
        not finite is no spike and does not count.
        """
        if not math.isfinite(norm):
            return False
        stands_out = norm > self._factor * self.median
        self._norms.append(norm)
        return stands_out

    def state(self) -> list[float]:
        """For :meth:`restore`: the norms, which JSON keeps to the bit."""
        return list(self._norms)

    def restore(self, state: Any) -> None:
        """Go on from a checkpoint's state; the latest norms count, if the window was longer.

        Raises:
            CheckpointError: it is no such state.
        """
        where = "the checkpoint's gradient norms"
        norms = conform({"norms": state}, dict[str, list[float]], where, error=CheckpointError)
        self._norms.clear()
        self._norms.extend(norms["norms"])
