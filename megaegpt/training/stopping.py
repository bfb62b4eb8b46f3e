"""Reasons to end a run before its last step: signals and a time limit, agreed on by all ranks."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_reduce_max

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequests:
    """A context manager that turns SIGTERM and SIGUSR1 into requests to save and stop.

    Args:
        exit_minutes: a request of its own after so many minutes; None: never.
        started: ``time.monotonic()`` of the program's start.
    """

    def __init__(self, exit_minutes: float | None = None, started: float | None = None) -> None:
        self._limit = exit_minutes
        self._started = time.monotonic() if started is None else started
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def agreed(self, failed: bool, grid: ProcessGrid) -> tuple[bool, str | None]:
        """Ask all ranks: has one of them failed, and why should the run stop (None: go on)?"""
        minutes = (time.monotonic() - self._started) / 60
        late = self._limit is not None and minutes >= self._limit
        some_failed, number, some_late = all_reduce_max([failed, self._signal, late], grid)
        if number:
            return bool(some_failed), signal.Signals(number).name
        return bool(some_failed), f"--exit-minutes {self._limit:g}" if some_late else None
