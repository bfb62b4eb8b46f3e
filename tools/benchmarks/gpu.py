"""The first hour on one GPU, in less: facts beside what they should be and the tests for GPUs, then
the speed of training, EGPT and decoding beside the aims, then what each remedy is worth.

A part that fails is noted, and the next one runs. Without a GPU the same path runs on the CPU at
sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from megaegpt.arguments import path
from megaegpt.errors import LaunchError
from megaegpt.parallel.launcher_variables import without_launcher
from tools.benchmarks import device_checks, egpt, generate, train
from tools.benchmarks.checklist import Checklist
from tools.benchmarks.common import add_repetitions, print_mfu, print_results
from tools.benchmarks.processes import Candidate, Result, Workload, compare

_ROOT = Path(__file__).parents[2]
_OPTIONS = {"zero": 0, "precision": "auto", "recompute": "none", "compile": True}
_WARMUP = 3
REMEDIES: dict[str, dict[str, Any]] = {
    "ZeRO-1, all remedies": {},
    "blocks compiled, without their own operators": {"fused_blocks": False},
    "the head operator by operator": {"fused_head": False},
    "attention without cuDNN": {"cudnn": False},
    "ZeRO-1 by DeepSpeed's own methods": {"fewer_operators": False},
    "ZeRO-2": {"zero": 2},
    "ZeRO-2 by DeepSpeed's own methods": {"zero": 2, "fewer_operators": False},
    "ZeRO-2, messages beside computation": {"zero": 2, "overlap_comm": True},
    "blocks neither compiled nor by their own operators": {
        "compile": False,
        "fused_blocks": False,
    },
    "the head 4,096 rows at a time": {"rows": 4096},
    "twice the micro-batch": {"times": 2},
}
"""Options of ``engines.build_engine`` that differ from the first; ``times`` as many sequences."""

_TRAIN = {"124M": 64, "355M": 32, "774M": 16, "1558M": 8}
"""Sequences of 1,024 tokens in a step; halved until they fit."""
_MFU_TARGETS = {"124M": 0.45, "355M": 0.50, "774M": 0.52, "1558M": 0.50}
_EGPT = {"hidden": 768, "layers": 3, "encoder_layers": 12, "heads": 12, "chunks": 16}
_DECODE = {"hidden": 768, "layers": 12, "heads": 12, "tokens": 128}
_TINY = {"hidden": 16, "layers": 1, "encoder_layers": 1, "heads": 2, "chunks": 2, "tokens": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py gpu``."""
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=list(_PARTS), help="default: all of them"
    )
    parser.add_argument(
        "--nodes",
        action="store_true",
        help="what several nodes do together instead; on every rank of torchrun or deepspeed",
    )
    parser.add_argument(
        "--page", type=path, metavar="FILE", help="write the tables here, as Markdown"
    )
    add_repetitions(parser, default=10)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check, measure, print, and return the record; its ``problems`` say what failed."""
    if arguments.nodes:
        from tools.benchmarks import nodes

        return nodes.run(arguments)
    began = time.perf_counter()
    suite = Suite(arguments.repetitions, torch.cuda.is_available())
    for name in arguments.parts:
        print(f"\n--- {name}, {MINUTES[name]:g} minutes at most", flush=True)
        suite.begin(MINUTES[name])
        suite.attempt(name, _PARTS[name])
    minutes = (time.perf_counter() - began) / 60
    suite.conclude(minutes, arguments.page)
    return {
        "minutes": minutes,
        "problems": suite.problems,
        "checks": suite.checks,
        "summary": suite.summary,
        "remedies": suite.remedies,
        "results": [result.as_dict() for result in suite.results],
    }


class Suite(Checklist):
    """The measurements of all parts: results, a summary, and the problems on the way."""

    def __init__(self, repetitions: int, on_gpu: bool) -> None:
        super().__init__("One GPU", on_gpu)
        self.summary: list[tuple[str, str, str]] = []
        self.remedies: list[tuple[str, str, str]] = []
        self.results: list[Result] = []
        self._repetitions = repetitions
        self._end = math.inf

    def begin(self, minutes: float) -> None:
        """Give the next part so much time."""
        self._end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float | None:
        """Of the part; None: any number."""
        return None if self._end == math.inf else max(self._end - time.monotonic(), 0.0)

    def measure(
        self, name: str, factory: Callable[..., Workload], batch: int, *more: Any, unit: str
    ) -> Result | None:
        """``factory(batch, *more)``, with half the batch as often as the GPU's memory is short."""
        while True:
            candidate = Candidate(f"{name}, batch {batch}", factory, (batch, *more))
            try:
                (result,) = compare(
                    [candidate], self._repetitions, warmup=_WARMUP, limit=self.seconds_left
                )
            except LaunchError as error:
                if "OutOfMemoryError" in str(error) and batch > 1:
                    batch //= 2
                    continue
                print(error)
                self.problems.append(f"{name} failed")
                self.summary.append((name, "failed", ""))
                return None
            self.results.append(result)
            print_results(name, unit, [result])
            return result

    def inspect(self, factory: Callable[..., Workload], *more: Any) -> None:
        """Note the checks of a workload of ``device_checks``."""
        candidate = Candidate(factory.__name__, factory, (self.on_gpu, *more))
        try:
            (result,) = compare([candidate], 1, warmup=0, limit=self.seconds_left)
        except LaunchError as error:
            print(error)
            self.problems.append(f"{candidate.name} failed")
            return
        for check in result.info["checks"]:
            self.note(*check)

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """By title, headings first; those that have rows."""
        tables: dict[str, list[tuple[str, ...]]] = {
            "Speed": [("", "measured", "target"), *self.summary],
            "Remedies": [("training 124M", "measured", "of the first"), *self.remedies],
        }
        return super().tables() | {title: rows for title, rows in tables.items() if len(rows) > 1}


# -- parts ----------------------------------------------------------------------------------------


def _facts(suite: Suite) -> None:
    suite.inspect(device_checks.environment)
    suite.inspect(device_checks.attention)
    suite.inspect(device_checks.graphs)
    for zero in (1, 2) if suite.on_gpu else (1,):
        suite.inspect(device_checks.waits, zero)


def _tests(suite: Suite) -> None:
    """The tests marked gpu; without a GPU, the same tests on the CPU. Again with cuDNN's attention
    behind the others.
    """
    _run_tests(suite, "tests", {})
    if suite.on_gpu:
        _run_tests(
            suite, "tests without cuDNN's attention", {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
        )


def _run_tests(suite: Suite, name: str, variables: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "gpu" if suite.on_gpu else "not gpu and not long", "-rs"]
        command = [sys.executable, "-m", "pytest", "tests/gpu", *words, f"--junitxml={report}"]
        subprocess.run(
            command,
            cwd=_ROOT,
            env=without_launcher(os.environ) | variables,
            check=False,
            timeout=suite.seconds_left,
        )
        counts = ElementTree.parse(report).getroot()[0].attrib
    failed = int(counts["failures"]) + int(counts["errors"])
    passed = int(counts["tests"]) - failed - int(counts["skipped"])
    holds = passed > 0 and not failed
    suite.note(f"{name} passed", str(passed), str(passed + failed), holds)


def _train(suite: Suite) -> None:
    for shape, batch in _TRAIN.items() if suite.on_gpu else {"small": 1}.items():
        context = 1024 if suite.on_gpu else 8
        result = suite.measure(
            f"training {shape}", _train_step, batch, shape, context, suite.on_gpu, unit="tokens"
        )
        if result is not None:
            print_mfu([result])
            target = f"{_MFU_TARGETS[shape]:.0%} MFU" if shape in _MFU_TARGETS else ""
            suite.summary.append((result.name, _with_mfu(result), target))


def _with_mfu(result: Result) -> str:
    mfu = f", {result.info['mfu']:.1%} MFU" if "mfu" in result.info else ""
    return f"{result.rate:,.0f} tokens/s{mfu}"


def _egpt(suite: Suite) -> None:
    """Windows of 16 x 1,024 tokens, against a GPT as deep as the encoder over as many tokens."""
    windows, size = (4, 1024) if suite.on_gpu else (1, 4)
    shape = _EGPT if suite.on_gpu else _TINY
    rates = {}
    for features in ("online features", "stored states"):
        name = f"EGPT, {features}"
        result = suite.measure(
            name, _egpt_step, windows, shape, size, features, suite.on_gpu, unit="tokens"
        )
        rates[name] = None if result is None else result.rate
    context = shape["chunks"] * size
    dense = "124M" if suite.on_gpu else "small"
    name = f"dense {dense} at {context:,}"
    result = suite.measure(name, _train_step, windows, dense, context, suite.on_gpu, unit="tokens")
    for egpt_name, rate in rates.items():
        if rate is not None and result is not None:
            ratio = f"{rate:,.0f} tokens/s, {rate / result.rate:.1f} x dense"
            suite.summary.append((egpt_name, ratio, "5 x dense" if "online" in egpt_name else ""))


def _decode(suite: Suite) -> None:
    for batch, how, target in ((1, "", "1,000 tokens/s"), (8, "", ""), (1, " not compiled", "")):
        work = (batch, suite.on_gpu, suite.on_gpu and not how)
        result = suite.measure(f"decoding{how}", _decoding, *work, unit="tokens")
        if result is not None:
            suite.summary.append((result.name, _with_mfu(result), target))


def _remedies(suite: Suite) -> None:
    """What each is worth: training with all of them, without one at a time, and with other sizes of
    pieces.
    """
    shape, batch, context = ("124M", 32, 1024) if suite.on_gpu else ("small", 1, 8)
    first: Result | None = None
    for name, changes in REMEDIES.items():
        options = _OPTIONS | {"zero": 1, "compile": suite.on_gpu, **changes}
        if not suite.on_gpu:
            options["compile"] = False
        work = (shape, context, suite.on_gpu, options)
        sequences = batch * changes.get("times", 1)
        result = suite.measure(name, _train_step, sequences, *work, unit="tokens")
        if result is None:
            continue
        print_mfu([result])
        first = first or result
        ratio = f"{result.rate / first.rate:.2f} x"
        if _batch(result) != changes.get("times", 1) * _batch(first):
            ratio = f"does not fit: batch {_batch(result)}"
        suite.remedies.append((name, _with_mfu(result), ratio))


def _batch(result: Result) -> int:
    """The batch that fitted."""
    return int(result.name.rpartition(" batch ")[2])


_PARTS: dict[str, Callable[[Suite], None]] = {
    "facts": _facts,
    "tests": _tests,
    "train": _train,
    "egpt": _egpt,
    "decode": _decode,
    "remedies": _remedies,
}


MINUTES = {
    "facts": 2.5,
    "tests": 6.0,
    "train": 5.0,
    "egpt": 3.0,
    "decode": 2.5,
    "remedies": 5.5,
}
"""The most that a part may take: what is not done by then is a problem, and the next part runs.
Estimates, under 25 minutes in all: most of it is compilation."""

# -- workloads ------------------------------------------------------------------------------------


def _train_step(
    batch: int, shape: str, context: int, compiled: bool, options: dict[str, Any] | None = None
) -> Workload:
    sizes = train.SHAPES[shape] | {"context": context, "batch": batch, "vocab": train.VOCAB}
    return train.ours(sizes, options or _OPTIONS | {"compile": compiled})


def _egpt_step(
    windows: int, shape: dict[str, int], chunk_size: int, features: str, compiled: bool
) -> Workload:
    sizes = shape | {"chunk_size": chunk_size, "windows": windows}
    return egpt.ours(sizes, features, _OPTIONS | {"compile": compiled})


def _decoding(batch: int, on_gpu: bool, compiled: bool) -> Workload:
    dtype = "bfloat16" if on_gpu else "float32"
    shape = (_DECODE if on_gpu else _TINY) | {"batch": batch, "dtype": dtype}
    return generate.ours(shape, compiled=compiled)
