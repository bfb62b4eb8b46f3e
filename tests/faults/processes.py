"""Ranks that can be killed: processes forked from one that has imported everything.

Starting Python, torch and DeepSpeed takes seconds, a fork of a process that has them a fraction of
one. That makes a hundred kills affordable.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaegpt.config.run import RunConfig
from megaegpt.errors import exits_cleanly
from megaegpt.parallel.launch import joined_processes
from megaegpt.training.pretraining import pretrain
from megaegpt.training.run_lock import locked_folders
from megaegpt.training.stopping import StopRequests
from tests.distributed.harness import CONTEXT
from tools.benchmarks.processes import free_port


def _rank(
    rank: int, world_size: int, port: int, output: Path, function: Callable[..., Any], args: Any
) -> None:
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    exits_cleanly(functools.partial(function, *args))()


def train(config: RunConfig, exit_minutes: float | None = None) -> None:
    """A rank of ``launchers/pretrain.py --resume --exit-minutes M``."""
    folders = (config.logging.directory, config.checkpoint.directory)
    with (
        joined_processes(
            config.parallel.tensor_parallel_size, config.parallel.context_parallel_size
        ) as grid,
        locked_folders(folders, grid),
    ):
        pretrain(config, grid, resume=True, stops=StopRequests(exit_minutes))


class Ranks:
    """``function(*args)`` on so many ranks of one machine, without a launcher that ends them.

    Args:
        folder: what rank r shows on stdout and stderr is in its file ``r.txt``.
        function: importable; it ends as a program's ``main`` does.
    """

    def __init__(
        self, world_size: int, folder: Path, function: Callable[..., Any], *args: Any
    ) -> None:
        port = free_port()
        self._folder = folder
        os.environ["OMP_NUM_THREADS"] = "1"
        self.processes = [
            CONTEXT.Process(
                target=_rank,
                args=(rank, world_size, port, folder / f"{rank}.txt", function, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for rank, process in enumerate(self.processes):
            (folder / f"{rank}.txt").write_bytes(b"")
            process.start()

    def wait(self, timeout: float) -> list[int | None]:
        """Exit codes by rank; None for a rank that had not ended in time, and is killed now."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these ranks; to all, if none is named."""
        chosen = [self.processes[rank] for rank in ranks] or self.processes
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()

    def shown(self, rank: int) -> str:
        """What a rank has written."""
        return (self._folder / f"{rank}.txt").read_text(errors="replace")
