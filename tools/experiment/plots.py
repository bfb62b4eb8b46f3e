"""The report's figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megaegpt.evaluation.history import HISTORIES
from tools.experiment.report import binned

_LINES = {"true": "-", "shuffled": "--", "zero": ":"}


def write_plots(report: dict[str, Any], folder: Path) -> list[str]:
    """One PNG a corpus in ``folder``; returns their names, none where matplotlib is missing."""
    if not importlib.util.find_spec("matplotlib"):
        print("notice: no plots: they need matplotlib (pip install matplotlib)")
        return []
    return [_plot(name, corpus, folder) for name, corpus in report["corpora"].items()]


def _plot(name: str, corpus: dict[str, Any], folder: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    totals, chunks, positions = figure.subplots(1, 3)
    _totals(totals, corpus)
    chunks.set(xlabel="earlier chunks there are", ylabel="nats/token", title="by chunk")
    positions.set(xlabel="position in the chunk", title="by position inside the chunk")
    results = {"encoder alone": corpus["encoder"], **corpus["steps"]}
    for number, (variant, result) in enumerate(results.items()):
        for kind in HISTORIES:
            if (losses := result["losses"].get(kind)) is None:
                continue
            style: dict[str, Any] = {"color": f"C{number}", "linestyle": _LINES[kind]}
            label = variant if kind == "true" else None
            chunks.plot(losses["by_chunk"], label=label, **style)
            bins = binned(losses["by_position"])
            positions.plot(list(bins), list(bins.values()), **style)
    positions.tick_params(axis="x", rotation=60)
    chunks.legend(fontsize=7, title="dashed: shuffled, dotted: zero features", title_fontsize=7)
    figure.suptitle(name)
    path = f"{name}.png"
    figure.savefig(folder / path, dpi=110)
    return path


def _totals(axes: Any, corpus: dict[str, Any]) -> None:
    """Every budget's losses with their spread over seeds."""
    rows = [("encoder alone", corpus["encoder"])]
    for budget in ("steps", "flops", "time"):
        for variant, result in corpus.get(budget, {}).items():
            suffix = "" if budget == "steps" else f" ({budget})"
            rows.append((variant + suffix, result))
    losses = [result["losses"]["true"] for _, result in rows]
    axes.errorbar(
        [loss["mean"] for loss in losses],
        range(len(rows)),
        xerr=[2 * (loss["sd"] or 0.0) for loss in losses],
        fmt="o",
        capsize=3,
    )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="nats/token, bars: 2 sd over seeds", title="whole reported text")
    axes.grid(alpha=0.3)
