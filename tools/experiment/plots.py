"""The report's figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megaegpt.evaluation.history import HISTORIES
from tools.experiment.report import CARRIED, GainsByLength, gains_by_length, readings_of

_LINES = {"true": "-", "shuffled": "--", "zero": ":"}


def write_plots(report: dict[str, Any], folder: Path) -> list[str]:
    """Two PNGs a corpus in ``folder``, and one of what a history is worth by its length where that
    was measured; returns their names, none where matplotlib is missing.
    """
    if not importlib.util.find_spec("matplotlib"):
        print("notice: no plots: they need matplotlib (pip install matplotlib)")
        return []
    corpora = report["corpora"].items()
    plots = [_plot(name, corpus, folder) for name, corpus in corpora]
    plots += [_frontier(name, corpus, folder) for name, corpus in corpora]
    gains = {name: found for name, corpus in corpora if (found := gains_by_length(corpus))}
    return [*plots, _history(gains, folder)] if gains else plots


def _plot(name: str, corpus: dict[str, Any], folder: Path) -> str:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4.5), layout="constrained")
    totals, chunks, positions = figure.subplots(1, 3)
    _totals(totals, corpus)
    chunks.set(xlabel="earlier chunks there are", ylabel="nats/token", title="by chunk")
    positions.set(xlabel="position in the chunk", title="by position inside the chunk")
    results, colors = {**readings_of(corpus), **corpus["steps"]}, colormaps["tab20"]
    for number, (variant, result) in enumerate(results.items()):
        for kind in HISTORIES:
            if (losses := result["losses"].get(kind)) is None:
                continue
            style: dict[str, Any] = {"color": colors(number % colors.N), "linestyle": _LINES[kind]}
            label = variant if kind == "true" else None
            chunks.plot(losses["by_chunk"], label=label, **style)
            bins = losses["by_position"]
            positions.plot(list(bins), list(bins.values()), **style)
    positions.tick_params(axis="x", rotation=60)
    title = "dashed: shuffled\ndotted: zero features"
    figure.legend(loc="outside right center", fontsize=8, title=title, title_fontsize=8)
    figure.suptitle(name)
    path = f"{name}.png"
    figure.savefig(folder / path, dpi=110)
    return path


def _frontier(name: str, corpus: dict[str, Any], folder: Path) -> str:
    """Loss against what reading a token costs, in operations and in bytes kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_flops, by_bytes = figure.subplots(1, 2, sharey=True)
    alone, trained = readings_of(corpus), corpus["steps"]
    top = _top(alone, trained)
    named: dict[Any, list[tuple[str, float, float]]] = {by_flops: [], by_bytes: []}
    for axes, cost in ((by_flops, "forward_flops"), (by_bytes, "cache_bytes")):
        for results, marker in ((alone, "s"), (trained, "o")):
            shown = {n: r for n, r in results.items() if r.get("cost")}
            x = [r["cost"][cost] for r in shown.values()]
            losses = {n: r["losses"]["true"]["mean"] for n, r in shown.items()}
            y = [min(loss, top) for loss in losses.values()]
            axes.plot(x, y, marker, label="trained" if results is trained else "encoder alone")
            texts = [n if loss <= top else f"{n}: {loss:.2f}" for n, loss in losses.items()]
            named[axes] += zip(texts, x, y, strict=True)
            carried = [r["losses"].get(CARRIED) for r in shown.values()]
            points = [(a, c["mean"]) for a, c in zip(x, carried, strict=True) if c]
            axes.plot(*zip(*points, strict=True) if points else ([], []), "k^", fillstyle="none")
        axes.grid(alpha=0.3)
    by_flops.set(xlabel="operations of a forward pass, by token", ylabel="nats/token")
    by_bytes.set(xlabel="bytes kept, by token of a window", xscale="log")
    by_flops.legend(fontsize=8, title="triangles: memory of the whole text", title_fontsize=7)
    figure.suptitle(f"{name}: loss against cost")
    figure.draw_without_rendering()  # so that places in the picture are known
    for axes, labelled in named.items():
        _write_names(axes, labelled)
    path = f"{name}_frontier.png"
    figure.savefig(folder / path, dpi=110)
    return path


def _history(corpora: dict[str, dict[str, GainsByLength]], folder: Path) -> str:
    """What a history is worth, against its length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (corpus, variants) in enumerate(corpora.items()):
        for name, (whole, last_window) in variants.items():
            color, label = f"C{number}", f"{corpus}: {name}"
            axes.plot(list(whole), list(whole.values()), "o-", color=color, label=label)
            axes.plot(list(last_window), list(last_window.values()), "o--", color=color)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens held", ylabel="nats a token below no history", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="dashed: the text's last window alone", title_fontsize=8)
    path = "history.png"
    figure.savefig(folder / path, dpi=110)
    return path


def _write_names(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Right of their points, and below the names of those that are close above."""
    size, width = 7, 90  # in the picture's own unit, a 72nd of an inch
    scale = 72 / axes.figure.dpi
    taken: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        across, up = axes.transData.transform((x, y)) * scale
        right, height = across + 8, up - 0.3 * size
        for other_right, other in taken:
            if abs(right - other_right) < width and height > other - size - 1:
                height = other - size - 1
        taken.append((right, height))
        offset = (8, height - up)
        axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize=size)


def _top(alone: dict[str, Any], trained: dict[str, Any]) -> float:
    """Above it a loss would squeeze the others; it is drawn here, with its number: of models far
    behind the encoder alone.
    """
    losses = [r["losses"]["true"]["mean"] for r in (*alone.values(), *trained.values())]
    highest = max(r["losses"]["true"]["mean"] for r in alone.values())
    return highest + 0.5 * (highest - min(losses))


def _totals(axes: Any, corpus: dict[str, Any]) -> None:
    """Every budget's losses with their spread over seeds."""
    rows = list(readings_of(corpus).items())
    for budget in ("steps", "flops", "time"):
        for variant, result in (corpus.get(budget) or {}).items():
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
