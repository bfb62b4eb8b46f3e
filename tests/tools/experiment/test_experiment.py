"""The smallest experiment from text to report: what it leaves, that it goes on where it stopped,
and that it stops by a signal's request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import experiment
from megaegpt.config.loading import config_to_yaml, load_config
from megaegpt.errors import CheckpointError, ConfigError, DataError
from megaegpt.files import locked_folder
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.stopping import StopRequests
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter
from tools.experiment.plan import ExperimentPlan, load_plan, merged
from tools.experiment.plots import write_plots
from tools.experiment.report import collect, insert, markdown
from tools.experiment.runs import (
    RESULT,
    Experiment,
    StoppedError,
    best_step,
    read_metrics,
    read_result,
)

CONFIGS = Path(__file__).parents[3] / "configs" / "experiments"


def smoke(output: Path) -> ExperimentPlan:
    return dataclasses.replace(load_plan(CONFIGS / "smoke.yaml"), output=str(output))


def _run(plan: ExperimentPlan, stops: StopRequests | None = None) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        Experiment(plan, grid_for(1), stops or StopRequests()).run()
    return shown.getvalue()


def _stop_and_go_on(output: Path) -> dict[str, Any]:
    """Stopped in its third training, gone on with, run again, one result made again, and measured
    once more where the output was moved.
    """
    plan = smoke(output)
    with pytest.raises(StoppedError):
        _run(plan, StopAfter(6 + 1 + 4 + 1 + 1))  # steps, and two measurements
    _run(plan)
    report = collect(plan)
    before = {p: p.stat().st_mtime_ns for p in output.rglob(RESULT)}
    assert "step" not in _run(plan)
    assert {p: p.stat().st_mtime_ns for p in output.rglob(RESULT)} == before
    shutil.rmtree(output / "runs/bible/steps/egpt/seed2")
    _run(plan)
    again = collect(plan)
    name = "by_seed"
    for variant, result in report["corpora"]["bible"]["steps"].items():
        for kind, losses in result["losses"].items():
            repeated = again["corpora"]["bible"]["steps"][variant]["losses"][kind]
            assert repeated[name] == losses[name], (variant, kind)
    moved = output.rename(output.with_name("moved"))
    longer = dataclasses.replace(plan, output=os.path.relpath(moved), memory_tokens=128)
    assert "tok/s" not in _run(longer)  # measured once more, and not trained
    later = collect(longer)["corpora"]["sources"]["steps"]["egpt_improved"]
    moved.rename(output)
    assert list(later["held"]) == ["16", "64", "128", "256"]
    assert later["losses"]["document"] == later["held"]["128"]
    different = r"another configuration: .*; optimizer\.warmup_steps is 1 there and 0 here\. Choose"
    with pytest.raises(CheckpointError, match=different):
        _run(dataclasses.replace(plan, run={**plan.run, "optimizer": {"warmup_steps": 0}}))
    changed = dataclasses.replace(plan, readings={**plan.readings, "behind_8": {"overlap": 4}})
    for again_done in (_run, collect):
        with pytest.raises(CheckpointError, match="behind_8 was read in another way"):
            again_done(changed)
    with locked_folder(output), pytest.raises(DataError, match="written by another run"):
        _run(plan)
    with pytest.raises(DataError, match="texts of another experiment"):
        _run(dataclasses.replace(plan, selection_share=0.5))
    return report


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def report(output: Path, distributed: Distributed) -> dict[str, Any]:
    return distributed(1, _stop_and_go_on, output)[0]


def test_every_variant_is_measured_with_every_seed(report):
    corpus = report["corpora"]["bible"]
    assert list(corpus["steps"]) == ["deepgpt", "egpt_no_history", "egpt", "egpt_improved"]
    for name, result in corpus["steps"].items():
        kinds = ["true", "shuffled", "zero"] if name in ("egpt", "egpt_improved") else ["true"]
        kinds += ["document"] if name == "egpt_improved" else []  # it has a token memory
        assert list(result["losses"]) == kinds
        assert list(result["held"]) == (["16", "64", "256"] if name == "egpt_improved" else [])
        assert result["cost"]["forward_flops"] > 0 < result["cost"]["cache_bytes"]
        losses = result["losses"]["true"]
        assert list(losses["by_seed"]) == ["1", "2"]
        assert len(set(losses["by_seed"].values())) == 2
        assert len(losses["by_chunk"]) == 4
        assert list(losses["by_position"]) == ["0", "1", "2-3", "4-7", "8-15"]
        assert losses["mean"] < math.log(50257)
        assert result["tokens"] == corpus["encoder"]["tokens"]
    assert list(corpus["readings"]) == ["behind_8", "dense"]
    assert corpus["steps"]["deepgpt"]["parameters"] < corpus["steps"]["egpt"]["parameters"]
    assert corpus["steps"]["egpt_improved"]["gates"][0] > 0


def test_what_one_corpus_trained_is_measured_on_another(report, output):
    corpus = report["corpora"]["sources"]
    assert list(corpus["readings"]) == ["dense"]
    assert list(corpus["steps"]) == ["deepgpt", "egpt_improved"]
    assert corpus["encoder"]["tokens"] == 192
    there, here = (
        json.loads((output / f"runs/{name}/steps/egpt_improved/seed1" / RESULT).read_text())
        for name in ("bible", "sources")
    )
    assert list(here["losses"]) == ["true", "shuffled", "zero"]
    assert set(here["held"]) == {"16", "64", "128", "256"}
    assert here["training"] == there["training"]
    assert here["losses"]["true"]["loss"] != there["losses"]["true"]["loss"]
    assert not (output / "runs/sources/steps/egpt_improved/seed1/weights").exists()


def test_a_decoder_that_starts_as_the_encoders_end_is_better_than_the_encoder(report):
    """The encoder has seen this text; four steps do not bring a new decoder as far."""
    corpus = report["corpora"]["bible"]
    encoder = corpus["encoder"]["losses"]["true"]["mean"]
    assert corpus["steps"]["egpt_improved"]["losses"]["true"]["mean"] < encoder
    assert corpus["steps"]["egpt"]["losses"]["true"]["mean"] > encoder


def test_history_changes_no_loss_in_the_first_chunk(report):
    losses = report["corpora"]["bible"]["steps"]["egpt_improved"]["losses"]
    for kind in ("shuffled", "zero"):
        assert losses[kind]["by_chunk"][0] == pytest.approx(losses["true"]["by_chunk"][0], rel=1e-7)
        assert losses[kind]["by_chunk"][1] != losses["true"]["by_chunk"][1]


def test_a_memory_that_holds_all_there_is_has_the_losses_of_the_whole_document(report):
    """The text has 6 to 8 chunks of 16; of one held chunk, only the second sees what it would."""
    result = report["corpora"]["bible"]["steps"]["egpt_improved"]
    document, held = result["losses"]["document"], result["held"]
    for length in ("16", "64"):
        first = held[length]["by_window"][0]
        assert (first == pytest.approx(document["by_window"][0], rel=1e-7)) == (length == "64")
    assert held["16"]["mean"] != held["64"]["mean"]


def test_gates_are_recorded_at_every_evaluation(report, output):
    records = read_metrics(output / "runs/bible/steps/egpt_improved/seed1")
    gates = {r["step"]: r["memory_gate/01"] for r in records if "memory_gate/01" in r}
    assert sorted(gates) == [2, 4]
    assert min(gates.values()) > 0


def test_the_chosen_checkpoint_is_the_best_on_the_selection_part(report, output):
    folder = output / "runs/bible/steps/deepgpt/seed1"
    result = json.loads((folder / RESULT).read_text())
    selection = {int(step): loss for step, loss in result["training"]["selection"].items()}
    assert sorted(selection) == [2, 4]
    assert result["chosen_step"] == min(selection, key=selection.__getitem__) == best_step(folder)
    assert (folder / "weights" / "model.safetensors").exists()
    assert not (folder / "checkpoints").exists()


def test_the_page_has_a_verdict_for_every_variant_and_a_figure(report, output):
    plots = write_plots(report, output)
    drawn = ["bible.png", "bible_frontier.png", "sources.png", "sources_frontier.png"]
    assert sorted(plots) == sorted([*drawn, "history.png"])
    for plot in plots:
        assert (output / plot).read_bytes().startswith(b"\x89PNG")
    page = markdown(report, plots)
    for words in ("egpt_improved", "encoder alone", "![bible.png]", "By position", "8-15"):
        assert words in page
    own = [sentence for sentence in report["findings"] if sentence.startswith("bible")]
    assert len(own) == 7  # 3 variants, 2 with features, a control, equal FLOPs
    assert len(report["findings"]) == 7 + 3  # a variant, its features, equal FLOPs
    assert "What a history is worth, by the chunks there are before" in page
    assert "| egpt_improved, last window | " in page
    assert sum("its control egpt_no_history" in sentence for sentence in report["findings"]) == 1


def test_a_budget_that_changes_no_number_of_steps_has_no_runs_of_its_own(report):
    assert report["corpora"]["bible"]["flops"] == {}
    same = "bible, equal training FLOPs: scaled to it, every variant has as many steps as before"
    found = [sentence for sentence in report["findings"] if sentence.startswith("bible")]
    assert [same in sentence for sentence in found] == [False] * 6 + [True]
    page = "<!-- experiment smoke -->\n<!-- end of experiment -->\n"
    assert same in insert(page, report, "smoke")
    only_steps = insert(page.replace("smoke", "smoke, equal steps"), report, "smoke")
    assert same not in only_steps
    assert "bible, equal steps" in only_steps


def test_the_tables_replace_what_was_between_the_marks_of_a_page(report):
    page = "a\n<!-- experiment smoke -->\nold\n<!-- end of experiment -->\nb\n"
    once = insert(page, report, "smoke")
    assert once.startswith("a\n<!-- experiment smoke -->\n\nRun on ")
    assert once.endswith("\n\n<!-- end of experiment -->\nb\n")
    assert "| egpt_improved | " in once
    assert "bible, nats a token below `zero`, on equal tokens, with so many tokens held:" in once
    assert "old" not in once
    assert insert(once, report, "smoke") == once
    with pytest.raises(DataError, match="lacks the lines <!-- experiment other -->"):
        insert(page, report, "other")


def _smallest(output: Path, encoder: Path, *variants: str) -> ExperimentPlan:
    """One seed of some variants on one corpus, over an encoder that is there."""
    plan = smoke(output)
    return dataclasses.replace(
        plan,
        corpora={"bible": plan.corpora["bible"]},
        seeds=1,
        controls={},
        budgets=("steps",),
        readings={},
        memory_tokens=None,
        memory_lengths={},
        encoder=dataclasses.replace(plan.encoder, source=str(encoder)),
        variants={name: plan.variants[name] for name in variants},
    )


def _stop_often(output: Path, encoder: Path) -> list[list[str]]:
    """Names of the checkpoints after each stop."""
    plan = _smallest(output, encoder, "deepgpt")
    training = {"training": {"steps": 12, "eval_interval": 4}}
    plan = dataclasses.replace(plan, run=merged(plan.run, training))
    run, found = output / "runs/bible/steps/deepgpt/seed1", list[list[str]]()
    for steps in (1 + 5, 1, 1, 2, 3):  # behind a measurement; in the end before the next one
        with pytest.raises(StoppedError):
            _run(plan, StopAfter(steps))
        plan = dataclasses.replace(plan, output=os.path.relpath(output))
        found.append(sorted(path.name for path in (run / "checkpoints").glob("step_*")))
    _run(plan)
    config = load_config(run / "run.yaml")
    earlier = dataclasses.replace(config.checkpoint, keep=4, keep_every=None)
    text = config_to_yaml(dataclasses.replace(config, checkpoint=earlier))
    (run / "run.yaml").write_text(text)
    assert "step" not in _run(plan)  # finished by an earlier version
    return found


def test_evaluated_checkpoints_outlive_any_number_of_stops(
    report: dict[str, Any], output: Path, distributed: Distributed, tmp_path: Path
) -> None:
    (found,) = distributed(1, _stop_often, tmp_path, output / "encoder" / "weights")
    assert all("step_00000004" in names for names in found), found
    assert {"step_00000008", "step_00000012"} <= set(found[-1]), found


def _stop_before_measurements(output: Path) -> None:
    plan, late = smoke(output), StopRequests(exit_minutes=0.0)
    for unit in ("bible/encoder", "bible/readings/dense", "sources/steps/deepgpt/seed1"):
        folder = output / "runs" / unit
        kept = folder.rename(output / "kept")
        with pytest.raises(StoppedError):
            _run(plan, late)
        assert not (folder / RESULT).exists()
        kept.rename(folder)
    _run(plan, late)  # nothing is missing
    with pytest.raises(StoppedError):
        _run(dataclasses.replace(plan, memory_tokens=32), late)


def test_a_request_to_stop_is_heeded_before_every_measurement(
    report: dict[str, Any], output: Path, distributed: Distributed
) -> None:
    distributed(1, _stop_before_measurements, output)


def _scale_to_time(output: Path, encoder: Path) -> None:
    """Steps of ``egpt``, at half the baseline's speed, are half as many, whatever is measured of
    the runs that follow; of the warm-up as many as fit.
    """
    plan = _smallest(output, encoder, "deepgpt", "egpt")
    plan = dataclasses.replace(plan, run=merged(plan.run, {"optimizer": {"warmup_steps": 3}}))
    runs = output / "runs/bible"

    def measured(variant: str, speed: float) -> None:
        path = runs / "steps" / variant / "seed1" / RESULT
        result = json.loads(path.read_text())
        result["training"]["tokens_per_second"] = speed
        path.write_text(json.dumps(result))

    _run(plan)
    measured("deepgpt", 1000.0)
    measured("egpt", 500.0)
    plan = dataclasses.replace(plan, budgets=("steps", "time"))
    missing = "bible, equal training time: no run of this budget is finished"
    report = collect(plan)
    assert report["findings"][-1] == missing
    page = "<!-- experiment smoke, equal training time -->\n<!-- end of experiment -->\n"
    assert f"{missing}." in insert(page, report, "smoke")
    write_plots(report, output)
    _run(plan)
    measured("egpt", 4e9)
    assert "step" not in _run(plan)
    assert read_result(runs / "time/egpt/seed1")["training"]["steps"] == 2
    assert not (runs / "time/deepgpt").exists()
    warmups = {b: load_config(runs / b / "egpt/seed1/run.yaml").optimizer for b in plan.budgets}
    assert [optimizer.warmup_steps for optimizer in warmups.values()] == [3, 1]


def test_a_runs_steps_within_a_budget_of_time_stay_as_they_are(
    report: dict[str, Any], output: Path, distributed: Distributed, tmp_path: Path
) -> None:
    distributed(1, _scale_to_time, tmp_path, output / "encoder" / "weights")


def _measure_stored_and_computed(output: Path) -> dict[str, Any]:
    """A memory that alone learns, as in ``smollm2.yaml``, read from stores and computed."""
    plan = smoke(output)
    rotary = {"model": {"positions": "rotary"}}
    frozen = ["layers:0-1", "norm", "head", "input_mlp", "embeddings", "sink"]
    variant = {
        "model": {
            "kind": "egpt",
            "bias": True,
            "positions": "rotary",
            "encoder": {"layers": 2, "initialize_decoder": True},
            "egpt": {
                "local_attention": True,
                "attention_sink": True,
                "memory_gate": True,
                "adapter_residual": True,
                "token_memory": True,
                "memory_dim": 8,
                "memory_chunks": 2,
            },
        },
        "training": {"freeze": frozen},
    }
    kept = {"token_features": "stored", "predictions": "stored", "feature_dtype": "float32"}
    plan = dataclasses.replace(
        plan,
        corpora={"bible": plan.corpora["bible"]},
        seeds=1,
        baseline="computed",
        controls={},
        budgets=("steps",),
        readings={},
        encoder=dataclasses.replace(plan.encoder, run=merged(plan.encoder.run, rotary)),
        variants={
            "computed": variant,
            "stored": {"base": "computed", "data": kept},
            "smaller_chunks": {
                "base": "stored",
                "model": {"egpt": {"num_chunks": 8, "chunk_size": 8}},
            },
        },
    )
    _run(plan)
    return collect(plan)


@pytest.mark.long
def test_losses_of_a_frozen_decoder_are_those_of_what_is_stored(
    distributed: Distributed, tmp_path: Path
) -> None:
    report = distributed(1, _measure_stored_and_computed, tmp_path)[0]
    steps = report["corpora"]["bible"]["steps"]
    computed, stored = (steps[name]["losses"] for name in ("computed", "stored"))
    assert list(stored) == ["true", "shuffled", "zero", "document"]
    for kind, losses in stored.items():
        assert losses["mean"] == pytest.approx(computed[kind]["mean"], rel=1e-5), kind
    assert {p.name for p in (tmp_path / "data/bible").rglob("*report*")}
    names = {p.name for p in (tmp_path / "data/bible/features").iterdir()}
    assert names == {"2_layers_overlap_0", "2_layers_overlap_0_chunks_of_8"}
    assert len(steps["smaller_chunks"]["losses"]["true"]["by_chunk"]) == 8
    page = markdown(report, []).partition("### By position inside the chunk")[2]
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize(
    ("reading", "needed"),
    [({"overlap": 24}, "16 at once and 24 before them needs 40"), ({"context": 48}, "needs 48")],
)
def test_a_reading_longer_than_the_encoders_context_is_refused_before_anything_is_trained(
    reading: dict[str, int], needed: str, tmp_path: Path
) -> None:
    plan = dataclasses.replace(smoke(tmp_path), readings={"longer": reading})
    with pytest.raises(ConfigError, match=f"readings.longer: the encoder sees 32 .*{needed}"):
        Experiment(plan, ProcessGrid(), StopRequests()).run()
    assert not (tmp_path / "data").exists()


def test_a_time_limit_for_a_report_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", str(CONFIGS / "smoke.yaml"), "--report-only", "--exit-minutes", "3"]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *options])
    with pytest.raises(SystemExit) as exit_:
        experiment.main()
    assert exit_.value.code == 2
    assert (
        "--exit-minutes stops training, and --report-only trains nothing" in capsys.readouterr().err
    )


def test_an_experiment_of_several_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    options = ["--config", str(CONFIGS / "smoke.yaml"), "--output", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *options])
    with pytest.raises(SystemExit) as exit_:
        experiment.main()
    assert exit_.value.code == 2
    assert "one process: start it without a launcher" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
