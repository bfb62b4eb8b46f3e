"""A report of what is not there, or is damaged, is refused in one line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers import experiment
from megaegpt.errors import DataError
from tests.report.test_runs import RECORDS, make_run
from tools.experiment.plan import load_plan
from tools.experiment.report import collect
from tools.experiment.runs import RESULT, best_step, read_result

_LOSSES = {
    "loss": 4.0,
    "nats_per_byte": 1.0,
    "tokens": 10,
    "bytes": 40,
    "by_chunk": [4.0],
    "by_position": [4.0],
}
_GOOD: dict[str, Any] = {
    "machine": "here",
    "finished": "2026-01-01",
    "losses": {"true": _LOSSES},
    "gates": [],
    "parameters": 100,
    "training": {},
}


def _report(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> int:
    command = ["experiment", "--config", "configs/experiments/smoke.yaml", "--report-only"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output), *arguments])
    with pytest.raises(SystemExit) as ended:
        experiment.main()
    return int(ended.value.code or 0)


def test_a_report_without_results_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(monkeypatch, tmp_path / "nothing") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "result.json does not exist: the run is not finished; start" in shown
    assert not (tmp_path / "nothing").exists()
    corpus = next((tmp_path / "none").glob("*"), tmp_path / "some" / "runs" / "bible" / "encoder")
    corpus.mkdir(parents=True)
    (corpus / RESULT).write_text(json.dumps(_GOOD))
    assert _report(monkeypatch, tmp_path / "some") == 2
    assert "no variant is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"losses": []}, "losses must be an object"),
        ({"losses": {"true": {**_LOSSES, "loss": None}}}, "losses.true.loss must be a number"),
        ({"gates": None}, "gates must be a list"),
        ({"machine": 3}, "machine must be text"),
    ],
)
def test_a_damaged_result_is_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    (tmp_path / RESULT).write_text(json.dumps(_GOOD))
    assert read_result(tmp_path) == _GOOD
    (tmp_path / RESULT).write_text(json.dumps({**_GOOD, **changes}))
    with pytest.raises(DataError, match=r"result\.json is damaged") as raised:
        read_result(tmp_path)
    assert told in str(raised.value)


def test_gains_are_of_the_seeds_that_both_variants_have(tmp_path: Path) -> None:
    plan = load_plan("configs/experiments/smoke.yaml")
    corpora, readings = {"bible": {"train": ["king_james_bible"]}}, dict[str, Any]()
    plan = replace(plan, output=str(tmp_path), corpora=corpora, readings=readings, controls={})

    def finish(folder: str, loss: float) -> None:
        run = tmp_path / "runs" / "bible" / folder
        run.mkdir(parents=True)
        losses = {"true": {**_LOSSES, "loss": loss}}
        (run / RESULT).write_text(json.dumps({**_GOOD, "losses": losses}))

    finish("encoder", 30.0)
    for seed in range(1, 12):
        finish(f"steps/deepgpt/seed{seed}", 10.0 + seed**2)
    for seed in (2, 10, 11):
        finish(f"steps/egpt/seed{seed}", 9.0 + seed**2)
    finish("steps/egpt_improved/seed3", 9.0)
    finish("steps/egpt_improved/seed12", 10.0)
    report = collect(plan)
    assert list(report["corpora"]["bible"]["steps"]["egpt"]["losses"]["true"]["by_seed"]) == [
        "2",
        "10",
        "11",
    ]
    first, second = report["findings"][:2]
    assert "a gain of +1.0000" in first
    assert "(and the gain itself by 0.0000)" in first
    assert second.endswith("less than two seeds of both say nothing about the spread")


def test_a_checkpoint_is_chosen_by_a_finite_loss(tmp_path: Path) -> None:
    diverged: list[dict[str, object]] = [{"step": 4, "validation_loss": None}]
    assert best_step(make_run(tmp_path / "late", [*RECORDS, *diverged])) == 2
    with pytest.raises(DataError, match="it diverged"):
        best_step(make_run(tmp_path / "at once", diverged))
