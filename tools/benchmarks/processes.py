"""Interleaved measurement of workloads in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaegpt.errors import LaunchError
from megaegpt.parallel.affinity import limit_threads

_SECONDS_TO_END = 5


@dataclass
class Workload:
    """The work that a candidate repeats."""

    run: Callable[[], None]
    """One repetition."""
    units: int
    """Work in a repetition (tokens, say)."""
    info: dict[str, Any] = field(default_factory=dict)
    """Facts to record: parameters, operations."""


@dataclass(frozen=True)
class Candidate:
    """A named workload: ``factory(*arguments)``, module-level and called in the new process(es)."""

    name: str
    factory: Callable[..., Workload]
    arguments: tuple[Any, ...] = ()
    processes: int = 1
    """Ranks that run it together (RANK, WORLD_SIZE and so on are set)."""
    threads: int | None = None
    """Threads of each; None: torch's default over the processes."""


@dataclass
class Result:
    """The measurements of a candidate."""

    name: str
    units: int
    seconds: list[float]
    cpu_seconds: list[float]
    """Processor time of all its threads and ranks: what a busy machine disturbs less."""
    peak_bytes: int
    info: dict[str, Any]

    @property
    def rate(self) -> float:
        """Units a second at the median repetition."""
        return self.units / statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON record."""
        return {
            "name": self.name,
            "units_per_second": self.rate,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": self.peak_bytes,
            **self.info,
        }


def compare(
    candidates: Sequence[Candidate],
    repetitions: int,
    warmup: int = 1,
    profile: Path | None = None,
    limit: float | None = None,
) -> list[Result]:
    """Run the candidates in turn, ``repetitions`` times after ``warmup`` rounds.

    Args:
        candidates: what to measure.
        repetitions: counted rounds.
        warmup: rounds before them.
        profile: at the end, trace one more repetition of the first candidate into this folder and
            print the ten operators that took longest.
        limit: seconds for all of it; None: any time.

    Raises:
        LaunchError: a candidate failed, and its traceback is in the message; or the time is over.
    """
    end = None if limit is None else time.monotonic() + limit
    groups = [_Group(candidate, end) for candidate in candidates]
    try:
        results = []
        for group in groups:
            units, info = group.ready()
            results.append(Result(group.candidate.name, units, [], [], 0, info))
        for repetition in range(-warmup, repetitions):
            for group, result in zip(groups, results, strict=True):
                seconds, cpu_seconds = group.repeat()
                if repetition >= 0:
                    result.seconds.append(seconds)
                    result.cpu_seconds.append(cpu_seconds)
                if sys.stderr.isatty():
                    print(f"\r{group.candidate.name}: {seconds:.3f} s ", end="", file=sys.stderr)
        for group, result in zip(groups, results, strict=True):
            result.peak_bytes = group.peak()
        if profile is not None:
            print(groups[0].profile(profile))
    finally:
        for group in groups:
            group.close()
    return results


def free_port() -> int:
    """One that no connection is given between this call and its use, as it is not of their range
    (32768 and more on Linux).
    """
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


class _Group:
    """The processes of one candidate, idle unless asked."""

    def __init__(self, candidate: Candidate, end: float | None = None) -> None:
        self.candidate = candidate
        self._end = end
        # A server that has imported torch, and run nothing with threads, forks the processes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "megaegpt.model.build"])
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(candidate.processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(candidate, rank, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((question, arguments))
        return [self._receive(pipe) for pipe in self._pipes]

    def _receive(self, pipe: Connection) -> Any:
        left = None if self._end is None else max(self._end - time.monotonic(), 0.0)
        try:
            if not pipe.poll(left):
                raise LaunchError(f"{self.candidate.name}: the time for it is over")
            ok, value = pipe.recv()
        except EOFError:
            raise LaunchError(f"{self.candidate.name}: its process died") from None
        if not ok:
            raise LaunchError(f"{self.candidate.name} failed:\n{value}")
        return value

    def ready(self) -> tuple[int, dict[str, Any]]:
        answers = [self._receive(pipe) for pipe in self._pipes]
        return answers[0]

    def repeat(self) -> tuple[float, float]:
        """Seconds by the clock, and of processor time."""
        times = self._ask(_seconds)
        return max(wall for wall, _ in times), sum(cpu for _, cpu in times)

    def peak(self) -> int:
        return sum(self._ask(_peak_bytes))

    def profile(self, folder: Path) -> str:
        return self._ask(_profile, folder)[0]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends an idle process
        for process in self._processes:
            overdue = self._end is not None and time.monotonic() > self._end
            process.join(0 if overdue else _SECONDS_TO_END)
            process.kill()
            process.join()


def _serve(candidate: Candidate, rank: int, port: int, pipe: Connection) -> None:
    world = candidate.processes
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
    limit_threads()
    threads = candidate.threads or max(torch.get_num_threads() // world, 1)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # given, so that ranks do not choose their own
    try:
        workload = candidate.factory(*candidate.arguments)
        pipe.send((True, (workload.units, workload.info)))
        while True:
            question, arguments = pipe.recv()
            pipe.send((True, question(workload, *arguments)))
    except EOFError:
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _seconds(workload: Workload) -> tuple[float, float]:
    began, cpu_began = time.perf_counter(), _cpu_seconds()
    workload.run()
    _wait_for_device()
    return time.perf_counter() - began, _cpu_seconds() - cpu_began


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _profile(workload: Workload, folder: Path) -> str:
    """Write ``trace.json``, for chrome://tracing or perfetto; the ten longest operators."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        workload.run()
        _wait_for_device()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=50)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes(_: Workload) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
