"""The end of the launcher, which must not leave ranks behind that train on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 1.0


def end_with_launcher() -> None:
    """Have SIGTERM, on which a run saves and stops, sent to this process at its launcher's end.

    The kernel sends it when the parent ends (Linux only; prctl(2)). The ``deepspeed`` command is
    the parent's parent: a thread watches for its end.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)
    runner = deepspeed_runner(parent)
    if runner is not None:
        watch = threading.Thread(target=_end_after, args=(parent, runner), daemon=True)
        watch.start()


def deepspeed_runner(parent: int) -> int | None:
    """The process of ``deepspeed`` that started ``parent``, if both are DeepSpeed's.

    It waits for ``parent`` to its end. A shell, nohup or tmux in its place may leave at any time
    and means nothing; on further machines, ``parent`` was started over the network.
    """
    runner = parent_of(parent)
    if runner is None or "deepspeed.launcher.launch" not in command_line_of(parent):
        return None
    started_by = [Path(word).name for word in command_line_of(runner)[:3]]
    return runner if {"deepspeed", "ds", "deepspeed.launcher.runner"} & set(started_by) else None


def _end_after(parent: int, runner: int) -> None:
    """SIGTERM to this process once ``runner`` has left its child ``parent`` behind."""
    while parent_of(parent) == runner:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def parent_of(process: int) -> int | None:
    """Number of the process that started a process; None where that cannot be read."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return int(status.rpartition(")")[2].split()[1])  # its name, in (), may hold spaces
    except (OSError, ValueError, IndexError):
        return None


def command_line_of(process: int) -> list[str]:
    """A process's command line; empty where that cannot be read."""
    try:
        content = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return []
    return os.fsdecode(content).split("\0")
