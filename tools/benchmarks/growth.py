"""How time, memory and start-up grow with the model, context, corpus, ranks and history.

Each curve has the exponent that it should have, from counts of operations and bytes at the same
points, beside the one that was measured. Times are processor time where the CPU computes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megaegpt.arguments import integer
from megaegpt.errors import LaunchError
from megaegpt.text_tables import format_table
from tools.benchmarks.common import add_repetitions, add_threads, check_plot, figure_class
from tools.benchmarks.growth_points import CURVES, Point
from tools.benchmarks.processes import compare

_SHARE = 0.8
"""Of the machine's free memory, that a point may need."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``benchmark.py growth``."""
    parser.add_argument(
        "--curves", nargs="+", choices=CURVES, default=list(CURVES), metavar="NAME",
        help=f"some of: {', '.join(CURVES)}",
    )  # fmt: skip
    parser.add_argument("--points", type=integer(2), metavar="N", help="the first N of a curve")
    parser.add_argument(
        "--limit", type=integer(1), default=120, metavar="S", help="seconds a point (%(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves (matplotlib)")
    add_repetitions(parser, default=3)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the record."""
    if arguments.plot is not None:
        check_plot(arguments.plot)
    curves: dict[str, Any] = {}
    for name in arguments.curves:
        axis, points = CURVES[name]
        rows = _measured(itertools.islice(points(arguments.threads), arguments.points), arguments)
        fits = exponents(rows)
        curves[name] = {"axis": axis, "rows": rows, "exponents": fits}
        _print(axis, rows, fits)
    if arguments.plot is not None:
        _plot(curves, arguments.plot)
        print(f"wrote {arguments.plot}")
    return {"curves": curves}


def _measured(points: Iterable[Point], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each point; one that does not fit, and those after it, are left out with a word."""
    rows: list[dict[str, Any]] = []
    for point in points:
        free = psutil.virtual_memory().available
        if point.needs > _SHARE * free:
            needs, left = point.needs / 2**30, free / 2**30
            print(
                f"from {point.x:,} on: left out, needs {needs:.1f} GiB of {left:.1f} that are free"
            )
            break
        try:
            values = _values(point, arguments)
        except LaunchError as error:
            if "the time for it is over" not in str(error):
                raise
            print(f"from {point.x:,} on: left out, takes longer than --limit {arguments.limit} s")
            break
        rows.append({"x": point.x, "expected": point.expected, "measured": values})
    return rows


def _values(point: Point, arguments: argparse.Namespace) -> dict[str, float]:
    if point.work is None:
        assert point.measured is not None
        taken = [point.measured() for _ in range(arguments.repetitions)]
        return {name: statistics.median(t[name] for t in taken) for name in point.expected}
    (result,) = compare([point.work], arguments.repetitions, limit=arguments.limit)
    seconds = result.seconds if torch.cuda.is_available() else result.cpu_seconds
    values = {"seconds a step": statistics.median(seconds), **result.info}
    return {name: values[name] for name in point.expected}


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By quantity, the expected and the measured exponent over the upper half of the points."""
    if len(rows) < 2:
        return {}
    x = [row["x"] for row in rows]
    return {
        name: {
            kind: exponent(x, [row[kind][name] for row in rows])
            for kind in ("expected", "measured")
        }
        for name in rows[0]["expected"]
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The a of y = c x^a, by least squares between logarithms over the upper half of the points.

    Example:
        >>> round(exponent([1, 10, 100, 1000], [7, 7, 20, 2000]), 6)
        2.0
    """
    half = max(2, math.ceil(len(x) / 2))
    slope, _ = np.polyfit(np.log(x[-half:]), np.log(y[-half:]), 1)
    return float(slope)


def _print(axis: str, rows: list[dict[str, Any]], fits: dict[str, dict[str, float]]) -> None:
    names = list(rows[0]["measured"]) if rows else []
    table = [[axis, *names]]
    for row in rows:
        table.append([f"{row['x']:,}", *(_shown(n, row["measured"][n]) for n in names)])
    for kind, title in (("expected", "exponent due"), ("measured", "exponent found")):
        if fits:
            table.append([title, *(f"{fits[name][kind]:.2f}" for name in names)])
    print(format_table(table))
    print(flush=True)


def _shown(name: str, value: float) -> str:
    return f"{value / 2**20:,.3g} MiB" if "bytes" in name else f"{value:.4g}"


def _plot(curves: dict[str, Any], path: Path) -> None:
    """A panel a curve: each quantity over its value at the last point, and dotted as expected."""
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = figure_class()(figsize=(5 * columns, 4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, curve in zip(panels, curves.values(), strict=False):
        x = [row["x"] for row in curve["rows"]]
        for number, (name, fit) in enumerate(curve["exponents"].items()):
            label = f"{name}: {fit['measured']:.2f}, due {fit['expected']:.2f}"
            for kind, style in (("measured", "o-"), ("expected", ":")):
                values = [row[kind][name] / curve["rows"][-1][kind][name] for row in curve["rows"]]
                shown = label if kind == "measured" else None
                axes.plot(x, values, style, color=f"C{number}", label=shown)
        axes.set(xscale="log", yscale="log", xlabel=curve["axis"], ylabel="of the last point")
        low, high = axes.get_ylim()  # what does not grow looks like it
        axes.set_ylim(min(low, 0.3), max(high, 3.0))
        axes.legend(fontsize=7, title="exponents; dotted: as expected", title_fontsize=7)
    figure.savefig(path, dpi=110)
