"""Reasons to end a run before its last step: signals and a time limit, agreed on by all ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from megaegpt.environment import is_other_rank, outliving_readers
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.launcher_variables import is_launched
from megaegpt.parallel.together import start_all_reduce_max

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """A context manager that turns SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) into requests to save and
    stop, and the end of whoever reads the output too: by the name of SIGPIPE, which Python ignores.
    Often that is Ctrl-C's own doing, for the terminal sends it to all of ``... | tee log``.

    A second Ctrl-C ends a single process at once. The ranks of a launcher get several for one: of
    the terminal, and of the launcher, which ends them itself if they take too long.

    Args:
        exit_minutes: a request of its own after so many minutes; None: never.
        started: ``time.monotonic()`` of the program's start.
    """

    def __init__(self, exit_minutes: float | None = None, started: float | None = None) -> None:
        self._limit = exit_minutes
        self._started = time.monotonic() if started is None else started
        self._signal = 0
        self._previous: dict[int, Any] = {}
        self._output = contextlib.ExitStack()
        self._answers: Callable[[], list[int]] = lambda: [0, 0, 0]

    def __enter__(self) -> StopRequests:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of a shell's background job
                self._previous[number] = signal.signal(number, self._note)
        self._output.enter_context(outliving_readers(self._note_unread))
        return self

    def __exit__(self, *_: object) -> None:
        self._output.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal != number:
            if not is_launched():
                signal.signal(number, self._previous[number])
            _say("stopping: this step is finished and saved first")
        self._signal = number

    def _note_unread(self) -> None:
        if not self._signal:
            _say("stopping, for nobody reads the output: this step is finished and saved first")
            self._signal = signal.SIGPIPE

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was the request."""
        return self._signal == signal.SIGINT

    @property
    def unread(self) -> bool:
        """Whether the end of whoever read the output was the request."""
        return self._signal == signal.SIGPIPE

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
        some_failed, *why = self._answers()
        return bool(some_failed), self._reason(*why)

    def watch(self, grid: ProcessGrid) -> Callable[[], str | None]:
        """For long work between steps: why it should stop, as it was when asked the time before,
        so that no rank waits for another's latest piece of work.

        What is returned is collective, and called equally often by all ranks.
        """
        asked: list[Callable[[], list[int]]] = []

        def why() -> str | None:
            before = asked.pop()()[1:] if asked else (0, 0)
            asked.append(start_all_reduce_max(self._own_answer(failed=False), grid))
            return self._reason(*before)

        return why

    def _reason(self, number: int, some_late: int) -> str | None:
        if number:
            return signal.Signals(number).name
        return f"--exit-minutes {self._limit:g}" if some_late else None

    def _own_answer(self, failed: bool) -> list[int]:
        minutes = (time.monotonic() - self._started) / 60
        late = self._limit is not None and minutes >= self._limit
        return [failed, self._signal, late]


def _say(text: str) -> None:
    if not is_other_rank():
        with contextlib.suppress(OSError):  # its reader has left
            os.write(2, f"\n{text}\n".encode())  # print() may be what was interrupted
