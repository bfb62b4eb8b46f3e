"""Interleaved measurement of workloads in processes of their own, and what is printed of them."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megaegpt.errors import ConfigError, LaunchError


@dataclass
class Workload:
    """What a candidate runs again and again."""

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
    """What was measured of a candidate."""

    name: str
    units: int
    seconds: list[float]
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
            "peak_bytes": self.peak_bytes,
            **self.info,
        }


def compare(
    candidates: Sequence[Candidate], repetitions: int, warmup: int = 1, quiet: bool = False
) -> list[Result]:
    """Run the candidates in turn, ``repetitions`` times after ``warmup`` rounds.

    Raises:
        LaunchError: a candidate failed; its traceback is in the message.
    """
    groups = [_Group(candidate) for candidate in candidates]
    try:
        results = []
        for group in groups:
            units, info = group.ready()
            results.append(Result(group.candidate.name, units, [], 0, info))
        for repetition in range(-warmup, repetitions):
            for group, result in zip(groups, results, strict=True):
                seconds = group.repeat()
                if repetition >= 0:
                    result.seconds.append(seconds)
                if not quiet and sys.stderr.isatty():
                    print(f"\r{group.candidate.name}: {seconds:.3f} s ", end="", file=sys.stderr)
        for group, result in zip(groups, results, strict=True):
            result.peak_bytes = group.peak()
    finally:
        for group in groups:
            group.close()
    return results


class _Group:
    """The processes of one candidate, idle unless asked."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
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

    def _ask(self, what: str) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(what)
        return [self._receive(pipe) for pipe in self._pipes]

    def _receive(self, pipe: Connection) -> Any:
        try:
            ok, value = pipe.recv()
        except EOFError:
            raise LaunchError(f"{self.candidate.name}: its process died") from None
        if not ok:
            raise LaunchError(f"{self.candidate.name} failed:\n{value}")
        return value

    def ready(self) -> tuple[int, dict[str, Any]]:
        answers = [self._receive(pipe) for pipe in self._pipes]
        return answers[0]

    def repeat(self) -> float:
        return max(self._ask("repeat"))

    def peak(self) -> int:
        return sum(self._ask("peak"))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(candidate: Candidate, rank: int, port: int, pipe: Connection) -> None:
    world = candidate.processes
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(candidate.threads or max(torch.get_num_threads() // world, 1))
    try:
        workload = candidate.factory(*candidate.arguments)
        pipe.send((True, (workload.units, workload.info)))
        while True:
            question = pipe.recv()
            if question == "peak":
                pipe.send((True, _peak_bytes()))
                continue
            began = time.perf_counter()
            workload.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pipe.send((True, time.perf_counter() - began))
    except EOFError:
        pass
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- arguments and output -------------------------------------------------------------------------


def parse_peers(values: Sequence[str], known: Sequence[str]) -> dict[str, Path | None]:
    """``name`` or ``name=path`` -> {name: path}.

    Raises:
        ConfigError: a name that is not known, or a path that does not exist.
    """
    peers: dict[str, Path | None] = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in known:
            raise ConfigError(f"--peer {name}: not one of {', '.join(known)}")
        if path and not Path(path).is_dir():
            raise ConfigError(f"--peer {value}: there is no folder {path}")
        peers[name] = Path(path).resolve() if path else None
    return peers


def add_repetitions(parser: argparse.ArgumentParser, default: int = 5) -> None:
    """The options that every subcommand has."""
    parser.add_argument(
        "--repetitions", type=int, default=default, metavar="N", help="counted rounds (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of a single process (torch's default)"
    )


def print_results(title: str, unit: str, results: Sequence[Result]) -> None:
    """A table: rate at the median, least and most, ratio to the first, peak memory."""
    print(f"\n{title}")
    rows = [("", f"{unit}/s", "min", "max", "ratio", "peak memory")]
    first = results[0].rate
    for result in results:
        slowest, fastest = result.units / max(result.seconds), result.units / min(result.seconds)
        rows.append(
            (
                result.name,
                f"{result.rate:,.1f}",
                f"{slowest:,.1f}",
                f"{fastest:,.1f}",
                f"{result.rate / first:.2f}",
                f"{result.peak_bytes / 2**30:.2f} GiB",
            )
        )
    print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the heading; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
        if number == 0:
            print("  ".join("-" * width for width in widths))


def machine() -> dict[str, Any]:
    """What a reader must know to read the figures."""
    versions = {}
    for package in ("torch", "deepspeed", "transformers", "tiktoken"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
