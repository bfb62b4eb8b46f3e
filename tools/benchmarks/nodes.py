"""Several nodes: who is there, what the networks carry, and whether training over them is right.

Every rank of a launcher runs this. It starts a process for each part, with a process group of its
own, and ends it when it has answered, when its time is over, or when a rank anywhere has failed. So
a part that fails or hangs leaves nothing behind, and the next one runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from megaegpt.errors import LaunchError
from megaegpt.parallel.launcher_variables import is_launched, number
from tools.benchmarks.checklist import Checklist
from tools.benchmarks.node_parts import Part, Place, all_parts
from tools.benchmarks.processes import free_port

_MEETING = timedelta(minutes=10)
"""How long ranks wait for each other between parts."""
_POLL_S = 0.1
_LAUNCHERS = (
    "start it on every node: `torchrun --nnodes N --nproc_per_node G ... tools/benchmark.py gpu "
    "--nodes` or `deepspeed --hostfile hosts tools/benchmark.py gpu --nodes`"
)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, judge, print, and return the record; empty on all ranks but the first.

    Raises:
        LaunchError: there is no launcher, or its nodes have different numbers of ranks.
    """
    began = time.perf_counter()
    ranks = Ranks()
    checklist = NodesChecklist(torch.cuda.is_available())
    found = measure(ranks, checklist, all_parts())
    if ranks.rank != 0:
        arguments.json = None
        return {}
    minutes = (time.perf_counter() - began) / 60
    checklist.conclude(minutes, arguments.page)
    return {
        "minutes": minutes,
        "ranks": ranks.world_size,
        "ranks_of_a_node": ranks.per_node,
        "problems": checklist.problems,
        "checks": checklist.checks,
        "found": found,
    }


class NodesChecklist(Checklist):
    """Checks, and a table of what sums over ranks take."""

    def __init__(self, on_gpu: bool) -> None:
        super().__init__("Several nodes", on_gpu)

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """By title, headings first; those that have rows."""
        heading = ("", "ranks", "bytes", "microseconds", "GB/s over a link")
        sums = {"Sums over ranks": [heading, *self.rows]} if self.rows else {}
        return super().tables() | sums


class Ranks:
    """The processes that a launcher has started, and the store in which they tell each other.

    Raises:
        LaunchError: there is no launcher, or its nodes have different numbers of ranks.
    """

    def __init__(self) -> None:
        if not is_launched():
            raise LaunchError(f"--nodes is for the ranks of a launcher: {_LAUNCHERS}")
        self.store, self.rank, self.world_size = next(dist.rendezvous("env://", timeout=_MEETING))
        self.store = dist.PrefixStore("parts", self.store)
        self.per_node = self._ranks_of_a_node()
        self._parts = 0

    def _ranks_of_a_node(self) -> int:
        self.store.set(f"node_of/{self.rank}", str(self.rank - number("LOCAL_RANK")))
        first = [int(self.store.get(f"node_of/{rank}")) for rank in range(self.world_size)]
        sizes = {first.count(rank) for rank in first}
        if len(sizes) > 1:
            raise LaunchError(
                f"nodes have {', '.join(map(str, sorted(sizes)))} ranks: start as many on each"
            )
        return sizes.pop()

    def attempt(self, part: Part) -> tuple[list[Any], str | None]:
        """Measure a part on all ranks that it takes; collective.

        Returns:
            The answers by rank, and what failed first; None if nothing did.
        """
        key, self._parts = f"part_{self._parts}", self._parts + 1
        size = self.per_node if part.one_node else self.world_size
        if self.rank == 0:
            self.store.set(f"{key}/port", str(free_port()))
        port = int(self.store.get(f"{key}/port"))
        keys = [f"{key}/answer/{rank}" for rank in range(size)]
        with contextlib.ExitStack() as until_all_have_answered:
            if self.rank < size:
                process, pipe = self._start(part, size, port)
                until_all_have_answered.callback(_end, process)
                answer, problem = self._answer(pipe, part, f"{key}/failed")
                if problem is not None:
                    self.store.set(
                        f"{key}/failed", f"rank {self.rank} on {socket.gethostname()}: {problem}"
                    )
                self.store.set(keys[self.rank], json.dumps(answer))
            self.store.wait(keys, _MEETING)
        answers = [json.loads(self.store.get(key)) for key in keys]
        failed = self.store.check([f"{key}/failed"])
        return answers, self.store.get(f"{key}/failed").decode() if failed else None

    def _start(self, part: Part, size: int, port: int) -> tuple[BaseProcess, Connection]:
        """This rank's process, which stays until it is ended: the first one's has the store that
        the others may still be reading when it has its own answer.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "megaegpt.model.build"])
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(part, self.rank, size, self.per_node, port, theirs), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours

    def _answer(self, pipe: Connection, part: Part, failed: str) -> tuple[Any, str | None]:
        """This rank's answer, or what its process said instead of one."""
        end = time.monotonic() + 60 * part.minutes
        while not pipe.poll(_POLL_S):
            if time.monotonic() > end:
                return None, f"no answer after {part.minutes:g} minutes"
            if self.store.check([failed]):
                return None, None
        try:
            answer, problem = pipe.recv()
            return answer, problem
        except EOFError:
            return None, "its process ended without a message"


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()


def measure(ranks: Ranks, checklist: NodesChecklist, parts: Sequence[Part]) -> dict[str, list[Any]]:
    """Run the parts one after the other, and judge on the first rank; results by part."""
    found: dict[str, list[Any]] = {}
    for part in parts:
        if ranks.rank == 0:
            print(f"\n--- {part.name}", flush=True)
        answers, problem = ranks.attempt(part)
        if problem is not None:
            if ranks.rank == 0:
                print(problem, flush=True)
                checklist.problems.append(f"{part.name}: {problem.splitlines()[-1]}")
            continue
        found[part.name] = answers
        if ranks.rank == 0:
            checklist.attempt(part.name, lambda notes: part.judge(notes, found))  # noqa: B023
    return found


def _serve(part: Part, rank: int, size: int, per_node: int, port: int, pipe: Connection) -> None:
    """In a process of its own: one rank's share of a part."""
    from megaegpt.parallel.grid import ProcessGrid
    from megaegpt.parallel.launch import init_distributed

    with contextlib.suppress(KeyError):
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # the launcher's store is on another port
    all_ranks = number("WORLD_SIZE")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_PORT=str(port))
    try:
        device = init_distributed()
        grid = ProcessGrid.create(1, device)
        place = Place(grid, per_node, all_ranks, device.type == "cuda")
        pipe.send((part.measure(place), None))
    except BaseException:
        pipe.send((None, traceback.format_exc().strip()))
    pipe.poll(None)
