"""Reasons to end a run before its last step: signals and a time limit, agreed on by all ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import start_all_reduce_max

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
        self._answers: Callable[[], list[int]] = lambda: [0, 0, 0]

    def __enter__(self) -> StopRequests:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def ask(self, failed: bool, grid: ProcessGrid) -> None:
        """Begin to ask all ranks: has one of them failed, and is there a reason to stop?

        Collective; the answers travel while this process does something else.
        """
        if grid.world_size == 1:
            self._answers = lambda: self._own_answer(failed)  # the latest
        else:
            self._answers = start_all_reduce_max(self._own_answer(failed), grid)

    def answer(self) -> tuple[bool, str | None]:
        """Whether some rank had failed when all were asked last, and why the run should stop (None:
        go on). Waits for the slowest rank to be asked.
        """
        some_failed, number, some_late = self._answers()
        if number:
            return bool(some_failed), signal.Signals(number).name
        return bool(some_failed), f"--exit-minutes {self._limit:g}" if some_late else None

    def _own_answer(self, failed: bool) -> list[int]:
        minutes = (time.monotonic() - self._started) / 60
        late = self._limit is not None and minutes >= self._limit
        return [failed, self._signal, late]
