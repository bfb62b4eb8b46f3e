"""Persistent groups of gloo processes: started once a module of tests, fed functions by queue.

Starting a process costs seconds (importing torch and DeepSpeed), so one group of each size serves
a module's tests, and ranks are forked from one process that has imported everything.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megaegpt.parallel.grid import ProcessGrid
from tools.benchmarks.processes import free_port

CONTEXT = multiprocessing.get_context("forkserver")
"""Where ranks come from. They compute on the CPU: a GPU's driver does not survive a fork."""
CONTEXT.set_forkserver_preload(["tests.distributed.preloaded"])


@functools.cache
def grid_for(tp_size: int, cp_size: int = 1) -> ProcessGrid:
    """The grid of this worker for one tensor- and context-parallel size, made once (call it on all
    ranks).
    """
    return ProcessGrid.create(tp_size, cp_size=cp_size)


def _worker(rank: int, world_size: int, port: int, tasks: Any, results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, True, function(*args)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class WorkerGroup:
    """``world_size`` processes that run the same function together, as ranks of one group."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        self._tasks = [CONTEXT.Queue() for _ in range(world_size)]
        self._results = CONTEXT.Queue()
        self._processes = [
            CONTEXT.Process(
                target=_worker,
                args=(rank, world_size, port, self._tasks[rank], self._results),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Call ``function(*args)`` on every rank; results by rank. A failure ends the group."""
        for tasks in self._tasks:
            tasks.put((function, args))
        results: dict[int, Any] = {}
        while len(results) < len(self._processes):
            try:
                rank, ok, value = self._results.get(timeout=timeout)
            except queue.Empty:
                self.kill()
                waiting = sorted(set(range(len(self._processes))) - set(results))
                raise TimeoutError(f"no answer from ranks {waiting} after {timeout} s") from None
            if not ok:
                self.kill()
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(len(self._processes))]

    @property
    def alive(self) -> bool:
        """All processes are there."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """Let the processes end."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(timeout=20)
        self.kill()

    def kill(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


class Distributed:
    """The ``distributed`` fixture: ``distributed(2, function, *args)`` -> results by rank.

    ``function`` must be importable (module level) and its arguments and results picklable.
    """

    def __init__(self) -> None:
        self._groups: dict[int, WorkerGroup] = {}

    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0
    ) -> list[Any]:
        group = self._groups.get(world_size)
        if group is None or not group.alive:
            group = self._groups[world_size] = WorkerGroup(world_size)
        return group.run(function, *args, timeout=timeout)

    def close(self) -> None:
        """End every group."""
        for group in self._groups.values():
            group.close()
