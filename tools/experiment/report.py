"""The report of an experiment: one JSON, and sentences and tables made of it."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from megaegpt.config.loading import run_config_from_dict
from megaegpt.errors import DataError
from megaegpt.evaluation.history import HISTORIES
from tools.experiment.plan import ExperimentPlan, decoder_values
from tools.experiment.runs import HELD, READINGS, RESULT, check_reading, read_result, read_steps

CARRIED = "document"
"""Losses with a token memory that holds the plan's ``memory_tokens`` of the whole text."""
_WITH_COST = ("gain", "document", "MFLOP/token", "bytes/token")
"""Columns of a report whose results have the cost of reading, which those of old have not."""
_GAIN_BY_LENGTH = "nats a token below `zero`, on equal tokens, with so many tokens held"
_BUDGETS = {"steps": "equal steps", "flops": "equal training FLOPs", "time": "equal training time"}


def collect(plan: ExperimentPlan) -> dict[str, Any]:
    """All finished runs, averaged over seeds, and what follows from them.

    Raises:
        DataError: the encoder, or every variant, of a corpus is still missing, or a result is
            damaged.
        CheckpointError: the encoder read in another way than the plan says.
    """
    folder = Path(plan.output)
    corpora = {name: _corpus(plan, folder / "runs" / name) for name in plan.corpora}
    return {
        "machines": _machines(folder),
        "baseline": plan.baseline,
        "variants": plan.variants,
        "run": plan.run,
        "corpora": corpora,
        "findings": [s for n, corpus in corpora.items() for s in findings(plan, n, corpus)],
    }


def _machines(folder: Path) -> list[str]:
    """Where the runs were."""
    runs = [read_result(path.parent) for path in sorted((folder / "runs").rglob(RESULT))]
    return sorted({run["machine"] for run in runs})


def _corpus(plan: ExperimentPlan, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"encoder": _over_seeds({1: folder / "encoder"})}
    result["readings"] = {}
    for name in plan.readings_on(folder.name):
        run = folder / READINGS / name
        if (run / RESULT).exists():
            check_reading(run, plan.reading(name))
            result["readings"][name] = _over_seeds({1: run})
    for budget in plan.budgets:
        found = {}
        for variant in plan.variants_on(folder.name):
            if runs := _by_seed(folder / budget / variant):
                found[variant] = _over_seeds(runs, plan.memory_tokens)
        result[budget] = found or ({} if _has_equal_steps(plan, folder, budget) else None)
    if not result["steps"]:
        raise DataError(f"{folder}: no variant is finished; train before it is reported")
    return result


def _by_seed(folder: Path) -> dict[int, Path]:
    """The finished runs of a variant, by the seed that a folder is named after."""
    names = [path.parent.name.removeprefix("seed") for path in folder.glob(f"seed*/{RESULT}")]
    return {n: folder / f"seed{n}" for n in sorted(int(name) for name in names if name.isdecimal())}


def _has_equal_steps(plan: ExperimentPlan, folder: Path, budget: str) -> bool:
    """Whether a budget was found to come to the steps that every variant has without it."""
    equal = run_config_from_dict(decoder_values(plan, plan.baseline), []).training.steps
    steps = read_steps(folder / budget)
    return all(steps.get(variant) == equal for variant in plan.variants_on(folder.name))


def _over_seeds(runs: dict[int, Path], memory_tokens: int | None = None) -> dict[str, Any]:
    """The runs of one variant, and of its losses those that all of them have."""
    by_seed = {seed: read_result(run) for seed, run in runs.items()}
    results = list(by_seed.values())
    first, training = results[0], [r["training"] for r in results]
    losses = _by_name({seed: r["losses"] for seed, r in by_seed.items()})
    losses = {kind: losses[kind] for kind in HISTORIES if kind in losses}
    held = _by_name({seed: r.get(HELD, {}) for seed, r in by_seed.items()})
    if str(memory_tokens) in held:
        losses[CARRIED] = held[str(memory_tokens)]
    return {
        "losses": losses,
        HELD: dict(sorted(held.items(), key=lambda length: int(length[0]))),
        "tokens": first["losses"]["true"]["tokens"],
        "bytes": first["losses"]["true"]["bytes"],
        "parameters": first["parameters"],
        "gates": [mean(layer) for layer in zip(*(r["gates"] for r in results), strict=True)],
        "cost": first.get("cost"),
        "chosen_steps": [r["chosen_step"] for r in results if "chosen_step" in r],
        **{
            name: mean(t[name] for t in training)
            for name in ("steps", "tokens_per_second", "memory_gib", "flops")
            if all(name in t for t in training)
        },
    }


def _by_name(results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    names = set.intersection(*(set(result) for result in results.values()))
    return {n: _losses({seed: result[n] for seed, result in results.items()}) for n in names}


def _losses(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    runs = list(by_seed.values())
    totals = [run["loss"] for run in runs]
    columns = {
        name: [mean(values) for values in zip(*(run[name] for run in runs), strict=True)]
        for name in ("by_window", "by_chunk", "by_position")
        if all(name in run for run in runs)  # results of earlier versions have no losses by window
    }
    return {
        "mean": mean(totals),
        "sd": stdev(totals) if len(totals) > 1 else None,
        "by_seed": {str(seed): run["loss"] for seed, run in by_seed.items()},
        "nats_per_byte": mean(run["nats_per_byte"] for run in runs),
        **columns,
        "by_position": binned(columns["by_position"]),
    }


# -- sentences ------------------------------------------------------------------------------------


def findings(plan: ExperimentPlan, name: str, corpus: dict[str, Any]) -> list[str]:
    """Compare the losses on a corpus in sentences, for or against EGPT."""
    found = []
    for budget in plan.budgets:
        if not corpus[budget]:
            found.append(f"{name}, {_without_runs(corpus, budget)}")
            continue
        variants = dict(corpus["steps"]) | corpus[budget]
        if plan.baseline not in variants:
            continue
        base = variants[plan.baseline]["losses"]["true"]
        for variant, result in variants.items():
            if variant == plan.baseline or (budget != "steps" and variant not in corpus[budget]):
                continue
            loss = result["losses"]["true"]
            found.append(
                f"{name}, {_BUDGETS[budget]}: {variant} "
                f"{compare_losses(base, loss, f'the baseline {plan.baseline}')}"
            )
            control = plan.controls.get(variant)
            if control in variants:
                other = variants[control]["losses"]["true"]
                found.append(
                    f"{name}, {_BUDGETS[budget]}: {variant} "
                    f"{compare_losses(other, loss, f'its control {control}')}"
                )
            if budget == "steps" and "shuffled" in result["losses"]:
                shuffled = result["losses"]["shuffled"]
                found.append(
                    f"{name}, {_BUDGETS[budget]}: {variant} with its own features "
                    f"{compare_losses(shuffled, loss, 'with those of another window')}"
                )
    return found


def _without_runs(corpus: dict[str, Any], budget: str) -> str:
    """Of a budget without runs of its own."""
    if corpus[budget] is None:
        return f"{_BUDGETS[budget]}: no run of this budget is finished"
    return (
        f"{_BUDGETS[budget]}: scaled to it, every variant has as many steps as before: these are "
        "the runs of equal steps"
    )


def compare_losses(other: dict[str, Any], loss: dict[str, Any], name: str) -> str:
    """``loss`` against ``other``: better, worse, or no difference beyond twice the spread."""
    shown = f"{loss['mean']:.4f} nats/token, {name} {other['mean']:.4f}"
    if loss["sd"] is None or other["sd"] is None:
        return f"has {shown}; one seed says nothing about the spread"
    ours, theirs = loss["by_seed"], other["by_seed"]
    gains = [theirs[seed] - own for seed, own in ours.items() if seed in theirs]
    if len(gains) < 2:  # the others are still missing
        return f"has {shown}; less than two seeds of both say nothing about the spread"
    gain, spread = mean(gains), max(loss["sd"], other["sd"])
    verdict = "no difference" if abs(gain) <= 2 * spread else "better" if gain > 0 else "worse"
    return (
        f"has {shown}: {verdict}, a gain of {gain:+.4f} where losses vary by {spread:.4f} over "
        f"seeds (and the gain itself by {stdev(gains):.4f})"
    )


# -- the page -------------------------------------------------------------------------------------


def insert(page: str, report: dict[str, Any], name: str) -> str:
    """``page`` with the report's tables of losses between its marks for experiment ``name``:
    ``<!-- experiment NAME -->``, or ``<!-- experiment NAME, equal steps -->`` for those alone, and
    ``<!-- end of experiment -->``.

    Raises:
        DataError: it has no such marks.
    """
    end = "<!-- end of experiment -->"
    begin = re.search(rf"<!-- experiment {re.escape(name)}(?:, (equal [\w ]+))? -->\n", page)
    before = page[: begin.end()] if begin else ""
    _, closed, after = page[len(before) :].partition(end)
    if not begin or not closed:
        raise DataError(f"the page lacks the lines <!-- experiment {name} --> and {end}")
    wanted = [b for b, title in _BUDGETS.items() if begin[1] in (None, title)]
    parts = [_circumstances(report)]
    for corpus_name, corpus in report["corpora"].items():
        parts += [part for budget in wanted for part in _tables(corpus_name, corpus, budget)]
        if "steps" in wanted and (lengths := _by_length(corpus)):
            parts += [f"{corpus_name}, {_GAIN_BY_LENGTH}:", lengths]
    return before + "\n" + "\n\n".join(parts) + "\n\n" + end + after


def _tables(name: str, corpus: dict[str, Any], budget: str) -> list[str]:
    """A corpus' losses within a budget, as paragraphs."""
    if corpus.get(budget):
        return [f"{name}, {_BUDGETS[budget]}: {_sizes(corpus)}", _main_table(corpus, budget)]
    return [f"{name}, {_without_runs(corpus, budget)}."] if budget in corpus else []


def _circumstances(report: dict[str, Any]) -> str:
    return (
        f"Run on {' and '.join(report['machines'])}; losses on text that neither training nor the "
        "choice of checkpoints has seen; sd: standard deviation over seeds."
    )


def markdown(report: dict[str, Any], plots: list[str]) -> str:
    """The whole report as one page; ``plots`` are file names beside it."""
    parts = [
        "# Does EGPT use its context?",
        _circumstances(report),
        "## What was found",
        "\n".join(f"- {sentence}." for sentence in report["findings"]),
        "A difference counts as one if it exceeds twice the larger standard deviation over seeds. "
        "The encoder alone was not trained on the corpus; all others were. `gain`: over the "
        "encoder alone, chunk by chunk. MFLOP and bytes are what reading costs by token of a "
        "window: operations of a forward pass, and what is kept in numbers of two bytes; "
        "`document`: with a token memory over the whole text.",
    ]
    for name, corpus in report["corpora"].items():
        parts += [f"## {name}", _sizes(corpus)]
        for budget, title in _BUDGETS.items():
            if corpus.get(budget):
                parts += [f"### {title[0].upper()}{title[1:]}", _main_table(corpus, budget)]
        parts += ["### By chunk of the window (earlier chunks there are)", _by_chunk(corpus)]
        if history := _by_history(corpus):
            parts += ["### What a history is worth, by the chunks there are before", history]
        if lengths := _by_length(corpus):
            parts += ["### What a history is worth by the tokens held", _GAIN_BY_LENGTH, lengths]
        parts += ["### By position inside the chunk", _by_position(corpus)]
    parts += [f"![{plot}]({plot})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def readings_of(corpus: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The encoder alone, chunk by chunk, and in other ways."""
    return {"encoder alone": corpus["encoder"], **corpus.get("readings", {})}


def _sizes(corpus: dict[str, Any]) -> str:
    encoder = corpus["encoder"]
    return f"{encoder['tokens']:,} tokens ({encoder['bytes']:,} bytes) are reported."


def _main_table(corpus: dict[str, Any], budget: str) -> str:
    rows = {**readings_of(corpus), **corpus["steps"], **corpus[budget]}
    header = ["", "seeds", "nats/token", "sd", "gain", "nats/byte", "shuffled", "zero", "document",
              "MFLOP/token", "bytes/token", "steps", "GFLOP", "parameters", "tokens/s", "GiB",
              "gates"]  # fmt: skip
    alone = corpus["encoder"]["losses"]["true"]["mean"]
    cells = [header, *([name, *_cells(result, alone)] for name, result in rows.items())]
    counted = any(result.get("cost") for result in rows.values())
    shown = [n for n, title in enumerate(header) if counted or title not in _WITH_COST]
    header, *lines = [[row[n] for n in shown] for row in cells]
    return _table(header, lines)


def _cells(result: dict[str, Any], alone: float) -> list[str]:
    """The row of ``result``; ``alone``: the encoder's loss."""
    losses = result["losses"]
    loss = losses["true"]
    others = [
        f"{losses[k]['mean']:.4f}" if k in losses else "" for k in ("shuffled", "zero", CARRIED)
    ]
    if reading := result.get("cost"):
        others += [f"{reading['forward_flops'] / 1e6:,.0f}", f"{reading['cache_bytes']:,.0f}"]
    else:
        others += ["", ""]
    cost = ["", "", f"{result['parameters']:,}", "", ""]
    if "flops" in result:
        cost = [
            f"{result['steps']:.0f}",
            f"{result['flops'] / 1e9:,.0f}",
            f"{result['parameters']:,}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['memory_gib']:.2f}",
        ]
    gates = ", ".join(f"{gate:.3f}" for gate in result["gates"])
    spread = "" if loss["sd"] is None else f"{loss['sd']:.4f}"
    mean_loss, per_byte = f"{loss['mean']:.4f}", f"{loss['nats_per_byte']:.4f}"
    gain = f"{alone - loss['mean']:.3f}"
    return [str(len(loss["by_seed"])), mean_loss, spread, gain, per_byte, *others, *cost, gates]


def _by_chunk(corpus: dict[str, Any]) -> str:
    rows = _lines(corpus, "by_chunk")
    longest = max(len(values) for values in rows.values())
    header = ["", *map(str, range(longest))]
    return _table(header, [[n, *(f"{v:.3f}" for v in values)] for n, values in rows.items()])


def _by_history(corpus: dict[str, Any]) -> str:
    """Nats a token by which losses without a history are above those with one, by how many chunks
    there are before, of which it may hold less; of a window's, and behind the first window of a
    memory that goes on.
    """
    rows = {}
    for name, result in corpus["steps"].items():
        losses = result["losses"]
        if "zero" not in losses:
            continue
        pairs = zip(losses["zero"]["by_chunk"], losses["true"]["by_chunk"], strict=True)
        gains = {k: v for k, v in binned([none - own for none, own in pairs]).items() if k != "0"}
        size = len(losses["zero"]["by_chunk"])
        windows = zip(
            losses["zero"].get("by_window", []),
            losses.get(CARRIED, {}).get("by_window", []),
            strict=False,
        )
        behind = {
            k: v for k, v in binned([none - own for none, own in windows]).items() if k != "0"
        }
        for label, gain in behind.items():
            first, _, last = label.partition("-")
            gains[f"{int(first) * size}-{(int(last or first) + 1) * size - 1}"] = gain
        rows[name] = gains
    columns = list(dict.fromkeys(label for gains in rows.values() for label in gains))
    cells = [
        [name, *(f"{gains[c]:.3f}" if c in gains else "" for c in columns)]
        for name, gains in rows.items()
    ]
    return _table(["", *columns], cells) if rows else ""


class GainsByLength(NamedTuple):
    """Of a variant over no history, by the tokens held."""

    whole: dict[int, float]
    last_window: dict[int, float]
    """Before which a text of several windows is as long as most lengths."""


def gains_by_length(corpus: dict[str, Any]) -> dict[str, GainsByLength]:
    """Those of the variants that were measured with several lengths."""
    found = {}
    for name, result in corpus["steps"].items():
        zero, held = result["losses"].get("zero"), result.get(HELD, {})
        if len(held) < 2 or zero is None:
            continue
        whole = {int(n): zero["mean"] - loss["mean"] for n, loss in held.items()}
        last = {int(n): zero["by_window"][-1] - loss["by_window"][-1] for n, loss in held.items()}
        found[name] = GainsByLength(whole, last)
    return found


def _by_length(corpus: dict[str, Any]) -> str:
    found = gains_by_length(corpus)
    columns = list(dict.fromkeys(length for gains in found.values() for length in gains.whole))
    lines = [
        [label, *(f"{gains[c]:.4f}" if c in gains else "" for c in columns)]
        for name, (whole, last_window) in found.items()
        for label, gains in ((name, whole), (f"{name}, last window", last_window))
    ]
    return _table(["", *(f"{c:,}" for c in columns)], lines) if found else ""


def _by_position(corpus: dict[str, Any]) -> str:
    rows = _lines(corpus, "by_position")
    columns = dict.fromkeys(label for bins in rows.values() for label in bins)
    cells = [
        [n, *(f"{bins[c]:.3f}" if c in bins else "" for c in columns)] for n, bins in rows.items()
    ]
    return _table(["", *columns], cells)


def _lines(corpus: dict[str, Any], what: str) -> dict[str, Any]:
    """A series of numbers for every line of the table of equal steps."""
    found = {n: reading["losses"]["true"][what] for n, reading in readings_of(corpus).items()}
    for name, result in corpus["steps"].items():
        for kind, losses in result["losses"].items():
            found[name if kind == "true" else f"{name}, {kind}"] = losses[what]
    return found


def binned(by_position: list[float]) -> dict[str, float]:
    """Means over positions 0, 1, 2-3, 4-7 and so on: history matters most where a chunk begins."""
    bins, start = {}, 0
    while start < len(by_position):
        end = min(max(2 * start, 1), len(by_position))
        label = str(start) if end == start + 1 else f"{start}-{end - 1}"
        bins[label] = mean(by_position[start:end])
        start = end
    return bins


def _table(header: list[str], rows: list[list[str]]) -> str:
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, marks, *rows])
