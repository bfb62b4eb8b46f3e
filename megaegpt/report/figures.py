"""Figures of runs, drawn by matplotlib (the extra ``plots``), which is imported here only."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""Positions and values."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def lines(
    curves: Mapping[str, Curve], x_label: str, y_label: str, *, marker: str = "", log: bool = False
) -> Figure:
    """Named curves in one plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    for name, (positions, values) in curves.items():
        label = name.replace("$", r"\$")  # it is no formula
        label = f" {label}" if label.startswith("_") else label  # which a legend would leave out
        shown = marker or ("." if _has_lone_point(values) else "")
        axes.plot(positions, values, marker=shown, label=label, linewidth=1)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")
    return figure


def _has_lone_point(values: Sequence[float]) -> bool:
    """Whether a value has no neighbour that a line could lead to."""
    finite = np.pad(np.isfinite(np.asarray(values, dtype=float)), 1)
    return bool((finite[1:-1] & ~finite[:-2] & ~finite[2:]).any())


def loss_by_chunk(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Validation loss of runs by the number of the chunk in its window."""
    curves = {name: (range(len(values)), values) for name, values in losses.items()}
    return lines(curves, "chunk of the window (earlier chunks seen)", "nats per token", marker="o")


def pixels(figure: Figure) -> np.ndarray:
    """The figure as an image (height, width, 3) of uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
