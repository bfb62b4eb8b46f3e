"""One or several runs as a single HTML file: tables, figures, and how the runs differ."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import Any

from megaegpt.config.loading import config_to_yaml
from megaegpt.report.figures import Curve, lines, loss_by_chunk
from megaegpt.report.runs import Run, config_differences

_MOST_POINTS = 400
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: right }
td:first-child, th:first-child { text-align: left }
figure { display: inline-block; width: min(100%, 600px); margin: 0 0 1em }
figure img { width: 100% } figcaption { font-weight: 600 }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
"""


def render(runs: Sequence[Run]) -> str:
    """The page; it needs no other file and no network."""
    title = html.escape("Runs: " + ", ".join(run.name for run in runs))
    sections = [
        f"<h1>{title}</h1>",
        _table(_summary(runs)),
        "<h2>Validation</h2>",
        _validation(runs),
        "<h2>Training</h2>",
        *_curves(runs),
        "<h2>How the configurations differ</h2>" if len(runs) > 1 else "",
        _differences(runs),
        "<h2>Configurations</h2>",
        *(_configuration(run) for run in runs),
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    body = "\n".join(section for section in sections if section)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


# -- tables ---------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run]) -> list[list[str]]:
    heading = ["run", "model", "steps", "tokens seen", "training loss", "validation loss"]
    heading += ["best", "nats/byte", "perplexity", "tokens/s", "MFU", "memory, GiB"]
    return [heading, *(_summary_row(run) for run in runs)]


def _summary_row(run: Run) -> list[str]:
    last, best = run.last_validation() or {}, run.best_validation() or {}
    loss = last.get("validation_loss")
    best_loss = f"{best['validation_loss']:.4f} at {best['step']:,}" if best else "-"
    utilisation, speeds = run.finite("mfu"), run.finite("tokens_per_second")
    return [
        run.name,
        run.config.model.kind,
        f"{run.steps:,} of {run.config.training.steps:,}",
        f"{run.tokens_before(run.steps):,}",
        _number(mean(losses[-10:]) if (losses := run.curve("loss")[1]) else None, ".4f"),
        _number(loss, ".4f"),
        best_loss,
        _number(last.get("validation_nats_per_byte"), ".4f"),
        _number(None if loss is None else math.exp(min(loss, 700.0)), ".2f"),
        _number(median(speeds) if speeds else None, ",.0f"),
        _number(100 * median(utilisation) if utilisation else None, ".1f"),
        _number(max(run.finite("memory_gib"), default=None), ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of plain text, the first of them the heading."""
    shown = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        shown.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row))
    return "<table>" + "\n".join(f"<tr>{row}</tr>" for row in shown) + "</table>"


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    rows = config_differences(runs)
    if not rows:
        return "<p>They do not.</p>"
    return _table([["key", *(run.name for run in runs)], *([k, *v] for k, v in rows.items())])


def _configuration(run: Run) -> str:
    text = html.escape(config_to_yaml(run.config))
    return f"<details><summary>{html.escape(run.name)}</summary><pre>{text}</pre></details>"


# -- figures --------------------------------------------------------------------------------------


def _validation(runs: Sequence[Run]) -> str:
    evaluated = [run for run in runs if run.last_validation()]
    if not evaluated:
        return "<p>No run was evaluated yet.</p>"
    over_tokens: dict[str, Curve] = {}
    for run in evaluated:
        steps, losses = run.curve("validation_loss")
        over_tokens[run.name] = ([run.tokens_before(step) for step in steps], losses)
    figure = lines(over_tokens, "tokens seen", "nats per token", marker="o")
    shown = _figure("Validation loss", figure)
    chunks = {r.name: c for r in evaluated if (c := _last_by_chunk(r))}
    if chunks:
        shown += _figure("Validation loss by chunk, latest", loss_by_chunk(chunks))
        numbers = [str(number) for number in range(max(map(len, chunks.values())))]
        rows = [[name, *(f"{loss:.3f}" for loss in losses)] for name, losses in chunks.items()]
        shown += _table([["chunk", *numbers], *rows])
    return shown


def _last_by_chunk(run: Run) -> list[float]:
    return (run.last_validation() or {}).get("validation_loss_by_chunk", [])


def _curves(runs: Sequence[Run]) -> Iterable[str]:
    """A figure for each quantity that some run has on record."""
    for key, caption, unit, log in (
        ("loss", "Training loss", "nats per token", False),
        ("grad_norm", "Gradient norm before clipping", "2-norm", True),
        ("lr", "Learning rate", "learning rate", False),
        ("tokens_per_second", "Throughput", "tokens per second", False),
        ("mfu", "Model FLOPs utilisation", "share of the peak", False),
        ("memory_gib", "Peak memory of a rank", "GiB", False),
    ):
        curves = {run.name: thinned(run.curve(key)) for run in runs if run.curve(key)[0]}
        if curves:
            yield _figure(caption, lines(curves, "step", unit, log=log))
    for run in runs:
        names = [n for n in _keys(run) if n.startswith("grad_norm/")]
        norms = {name.partition("/")[2]: thinned(run.curve(name)) for name in names}
        if norms:
            caption = f"Gradient norm by layer: {run.name}"
            yield _figure(caption, lines(norms, "step", "2-norm", log=True))


def _keys(run: Run) -> list[str]:
    return list(dict.fromkeys(key for record in run.records for key in record))


def thinned(curve: tuple[Sequence[float], Sequence[float]]) -> Curve:
    """At most 400 points: the means of as many pieces, so that nothing is hidden between them;
    where a piece holds a nan, the curve has a gap.
    """
    length = len(curve[0])
    if length <= _MOST_POINTS:
        return curve
    bounds = [number * length // _MOST_POINTS for number in range(_MOST_POINTS + 1)]
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return [mean(curve[0][p]) for p in pieces], [mean(curve[1][p]) for p in pieces]


def _figure(caption: str, figure: Any) -> str:
    """An image of its own, so that the names inside several of them cannot collide."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "megaegpt", "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    data = base64.b64encode(drawn.getvalue().encode()).decode()
    text = html.escape(caption)
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="{source}"></figure>'
