"""One GPU in ten minutes: the tests for GPUs, then the speed of training, EGPT and decoding.

Without a GPU the same path runs on the CPU at sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from megaegpt.errors import LaunchError
from megaegpt.text_tables import format_table
from tools.benchmarks import egpt, generate, train
from tools.benchmarks.common import add_repetitions, print_mfu, print_results
from tools.benchmarks.processes import Candidate, Result, Workload, compare

_ROOT = Path(__file__).parents[2]
_OPTIONS = {"zero": 0, "precision": "auto", "recompute": "none", "compile": True}
_WARMUP = 3

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
    add_repetitions(parser, default=10)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check, measure, print, and return the record; its ``problems`` say what failed."""
    began = time.perf_counter()
    suite = Suite(arguments.repetitions, torch.cuda.is_available())
    for name in arguments.parts:
        print(f"\n--- {name}", flush=True)
        _PARTS[name](suite)
    print()
    print(format_table([("", "measured", "target"), *suite.summary]))
    if not suite.on_gpu:
        print("there is no GPU: these are tiny sizes on the CPU, and say nothing about speed")
    minutes = (time.perf_counter() - began) / 60
    print(f"{minutes:.1f} minutes")
    return {
        "minutes": minutes,
        "problems": suite.problems,
        "summary": suite.summary,
        "results": [result.as_dict() for result in suite.results],
    }


class Suite:
    """The measurements of all parts: results, a summary, and the problems on the way."""

    def __init__(self, repetitions: int, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.problems: list[str] = []
        self.summary: list[tuple[str, str, str]] = []
        self.results: list[Result] = []
        self._repetitions = repetitions

    def measure(
        self, name: str, factory: Callable[..., Workload], batch: int, *more: Any, unit: str
    ) -> Result | None:
        """``factory(batch, *more)``, with half the batch as often as the GPU's memory is short."""
        while True:
            candidate = Candidate(f"{name}, batch {batch}", factory, (batch, *more))
            try:
                (result,) = compare([candidate], self._repetitions, warmup=_WARMUP)
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


# -- parts ----------------------------------------------------------------------------------------


def _checks(suite: Suite) -> None:
    """The tests marked gpu; without a GPU, the same tests on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "gpu" if suite.on_gpu else "not gpu", "-rs", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "tests/gpu", *words]
        subprocess.run(command, cwd=_ROOT, check=False)
        counts = ElementTree.parse(report).getroot()[0].attrib
    failed = int(counts["failures"]) + int(counts["errors"])
    passed = int(counts["tests"]) - failed - int(counts["skipped"])
    suite.summary.append(("tests passed", str(passed), f"{passed + failed}"))
    if failed or not passed:
        suite.problems.append(f"{failed} of {passed + failed} tests failed")


def _train(suite: Suite) -> None:
    for shape, batch in _TRAIN.items() if suite.on_gpu else {"small": 1}.items():
        context = 1024 if suite.on_gpu else 8
        result = suite.measure(
            f"training {shape}", _train_step, batch, shape, context, suite.on_gpu, unit="tokens"
        )
        if result is not None:
            print_mfu([result])
            target = f"{_MFU_TARGETS[shape]:.0%} MFU" if shape in _MFU_TARGETS else ""
            suite.summary.append((f"training {shape}", _with_mfu(result), target))


def _with_mfu(result: Result) -> str:
    mfu = f", {result.info['mfu']:.1%} MFU" if "mfu" in result.info else ""
    return f"{result.rate:,.0f} tokens/s{mfu}"


def _egpt(suite: Suite) -> None:
    """Windows of 16 x 1,024 tokens, against a GPT as deep as the encoder over as many tokens."""
    windows, size = (4, 1024) if suite.on_gpu else (1, 4)
    shape = _EGPT if suite.on_gpu else _TINY
    rates = {}
    for features in ("online", "stored"):
        name = f"EGPT, {features} features"
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
    for batch in (1, 8):
        result = suite.measure(f"decoding {batch}", _decoding, batch, suite.on_gpu, unit="tokens")
        if result is not None:
            target = "1,000 tokens/s" if batch == 1 else ""
            suite.summary.append((f"decoding, batch {batch}", _with_mfu(result), target))


_PARTS: dict[str, Callable[[Suite], None]] = {
    "checks": _checks,
    "train": _train,
    "egpt": _egpt,
    "decode": _decode,
}


# -- workloads ------------------------------------------------------------------------------------


def _train_step(batch: int, shape: str, context: int, compiled: bool) -> Workload:
    sizes = train.SHAPES[shape] | {"context": context, "batch": batch, "vocab": train.VOCAB}
    return train.ours(sizes, _OPTIONS | {"compile": compiled})


def _egpt_step(
    windows: int, shape: dict[str, int], chunk_size: int, features: str, compiled: bool
) -> Workload:
    sizes = shape | {"chunk_size": chunk_size, "windows": windows}
    return egpt.ours(sizes, features, _OPTIONS | {"compile": compiled})


def _decoding(batch: int, on_gpu: bool) -> Workload:
    dtype = "bfloat16" if on_gpu else "float32"
    shape = (_DECODE if on_gpu else _TINY) | {"batch": batch, "dtype": dtype}
    return generate.ours(shape, compiled=on_gpu)
