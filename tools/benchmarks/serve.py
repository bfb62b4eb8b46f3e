"""The server under load: latencies, tokens a second, and whether its memory stays flat.

``tools/serve.py`` runs in a process of its own. Clients ask for texts of random lengths one after
the other, and some leave in the middle of a text.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megaegpt.arguments import integer, number, path
from megaegpt.errors import LaunchError
from megaegpt.text_tables import format_table
from tools.benchmarks.common import add_sizes

_WORDS = "the prince said to his old friend that nothing of it was ever true".split()  # noqa: SIM905
_WARM_UP = 0.5
"""Share of the time after which memory must not grow any more."""
_MOST_GROWTH = 0.05
_POINTS = 60
"""Of the record's curve of memory, at least."""
_QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py serve``."""
    parser.add_argument("--checkpoint", required=True, type=path, metavar="PATH", help="the model")
    parser.add_argument(
        "--seconds", type=number(above=0), default=60.0, metavar="S", help="default: %(default)s"
    )
    add_sizes(
        parser,
        {
            "clients": (16, "that ask at once"),
            "batch-size": (8, "of the server"),
            "prompt-words": (128, "most words of a prompt"),
            "new-tokens": (64, "most tokens of an answer"),
        },
    )
    parser.add_argument(
        "--context",
        type=integer(1),
        metavar="N",
        help="of the server (default: as much as the model sees; an egpt and a deepgpt have none)",
    )
    parser.add_argument(
        "--leaving",
        type=number(least=0, most=1),
        default=0.1,
        metavar="P",
        help="share of the requests whose client leaves in the middle (default: %(default)s)",
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the server, print, and return the record."""
    with _server(arguments) as (process, port):
        load = _Load(arguments, port)
        memory = load.run(process)
        left = _health(port)
    record = load.summary(memory) | {"running_at_the_end": left["running"]}
    record["problems"] = _problems(record)
    _show(record)
    return record


@contextlib.contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[tuple[psutil.Process, int]]:
    program = Path(__file__).parents[1] / "serve.py"
    given = [
        *("--checkpoint", str(arguments.checkpoint), "--port", "0"),
        *("--batch-size", str(arguments.batch_size), "--queue", str(arguments.clients)),
        *("--name", "load"),
    ]
    if arguments.context is not None:
        given += ["--context", str(arguments.context)]
    with subprocess.Popen(
        [sys.executable, str(program), *given], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"^serving .*:(\d+) ", line):
                    break
            else:
                raise LaunchError("the server did not start; it says why above")
            yield psutil.Process(process.pid), int(found[1])
        finally:
            process.terminate()


@dataclass
class _Seen:
    """What the clients have seen together."""

    first: list[float] = field(default_factory=list)
    """Seconds from a request to its first piece of text."""
    whole: list[float] = field(default_factory=list)
    """Seconds of whole requests."""
    each: list[float] = field(default_factory=list)
    """Seconds a token after the first, a request's mean."""
    tokens: int = 0
    left: int = 0
    statuses: Counter[str] = field(default_factory=Counter)


class _Load:
    def __init__(self, arguments: argparse.Namespace, port: int) -> None:
        self._arguments, self._port = arguments, port
        self._seen, self._lock = _Seen(), threading.Lock()
        self._seconds = 0.0

    def run(self, process: psutil.Process) -> list[tuple[float, int]]:
        """Until the time is over; the server's resident bytes by the second."""
        began = time.perf_counter()
        end = began + self._arguments.seconds
        clients = [
            threading.Thread(target=self._client, args=(number, end), daemon=True)
            for number in range(self._arguments.clients)
        ]
        for client in clients:
            client.start()
        memory = []
        while any(client.is_alive() for client in clients):
            memory.append((time.perf_counter() - began, process.memory_info().rss))
            time.sleep(min(1.0, self._arguments.seconds / 20))
        self._seconds = time.perf_counter() - began
        return memory

    def _client(self, number: int, end: float) -> None:
        draw = random.Random(f"{self._arguments.seed} {number}")
        while time.perf_counter() < end:
            try:
                self._ask(draw)
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self._seen.statuses[type(error).__name__] += 1

    def _ask(self, draw: random.Random) -> None:
        arguments = self._arguments
        words = draw.choices(_WORDS, k=draw.randint(1, arguments.prompt_words))
        tokens = draw.randint(1, arguments.new_tokens)
        leaves_after = draw.randrange(tokens) if draw.random() < arguments.leaving else None
        body = {
            "model": "load",
            "prompt": " ".join(words),
            "max_tokens": tokens,
            "seed": draw.randrange(2**31),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        with contextlib.closing(connection):
            began = time.perf_counter()
            sent, kind = json.dumps(body), {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", sent, kind)
            answer = connection.getresponse()
            with self._lock:
                self._seen.statuses[str(answer.status)] += 1
            if answer.status == 429:
                time.sleep(float(answer.headers["Retry-After"]))
            elif answer.status == 200:
                self._read(answer, began, leaves_after)

    def _read(
        self, answer: http.client.HTTPResponse, began: float, leaves_after: int | None
    ) -> None:
        first = None
        pieces = tokens = 0
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise http.client.HTTPException(chunk["error"]["message"])
            first = first or time.perf_counter()
            tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
            pieces += 1
            if leaves_after is not None and pieces > leaves_after:
                with self._lock:
                    self._seen.left += 1
                    self._seen.tokens += pieces  # that came: a piece is a token or more
                return
        end = time.perf_counter()
        first = first or end
        with self._lock:
            self._seen.first.append(first - began)
            self._seen.whole.append(end - began)
            self._seen.tokens += tokens
            if tokens > 1:
                self._seen.each.append((end - first) / (tokens - 1))

    def summary(self, memory: Sequence[tuple[float, int]]) -> dict[str, Any]:
        """The record."""
        seen = self._seen
        warm = [size for at, size in memory if at >= _WARM_UP * self._arguments.seconds]
        warm = warm or [size for _, size in memory]
        names = ("first token", "token after it", "request")
        return {
            "seconds": self._seconds,
            "statuses": dict(seen.statuses),
            "left": seen.left,
            "tokens_per_second": seen.tokens / self._seconds,
            "requests_per_second": len(seen.whole) / self._seconds,
            "latencies": {
                name: {label: _quantile(values, share) for label, share in _QUANTILES.items()}
                for name, values in zip(names, (seen.first, seen.each, seen.whole), strict=True)
            },
            "memory": {"warm": warm[0], "end": warm[-1], "most": max(size for _, size in memory)},
            "memory_over_time": memory[:: max(len(memory) // _POINTS, 1)],
        }


def _quantile(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def _health(port: int) -> dict[str, Any]:
    """Once nothing is left of the clients that went."""
    for _ in range(100):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            found: dict[str, Any] = json.load(connection.getresponse())
        if not found["running"] and not found["waiting"]:
            break
        time.sleep(0.1)
    return found


def _problems(record: dict[str, Any]) -> list[str]:
    others = {s: n for s, n in record["statuses"].items() if s not in ("200", "429")}
    problems = [f"{count} requests ended with {status}" for status, count in others.items()]
    if record["running_at_the_end"]:
        problems.append(f"{record['running_at_the_end']} texts of clients that left are written on")
    memory = record["memory"]
    if memory["end"] > (1 + _MOST_GROWTH) * memory["warm"]:
        problems.append(f"memory grew from {memory['warm']:,} to {memory['end']:,} bytes")
    return problems


def _show(record: dict[str, Any]) -> None:
    rows = [("milliseconds", *_QUANTILES)]
    for name, found in record["latencies"].items():
        rows.append((name, *("-" if s is None else f"{1000 * s:,.0f}" for s in found.values())))
    print(format_table(rows))
    statuses = ", ".join(f"{count} x {status}" for status, count in record["statuses"].items())
    memory = {name: f"{size / 2**20:,.0f}" for name, size in record["memory"].items()}
    print(
        f"{record['tokens_per_second']:.1f} tokens/s, {record['requests_per_second']:.2f} "
        f"requests/s over {record['seconds']:.0f} s; {statuses}; {record['left']} clients left\n"
        f"resident MiB: {memory['warm']} when warm, {memory['end']} at the end, at most "
        f"{memory['most']}"
    )
