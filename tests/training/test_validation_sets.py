"""Several corpora are evaluated beside each other, each by its name."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest

from megaegpt.config.run import RunConfig
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.errors import DataError
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.pretraining import pretrain
from megaegpt.training.run_data import PretrainingData
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, corpus, records, run_config, validation_losses

__all__ = ["corpus"]


def _config(kind: str, corpus: Path, folder: Path) -> RunConfig:
    sets = (f"seen={corpus}/train", f"same={corpus}/validation", f"twice={corpus}/validation")
    return run_config(
        kind,
        corpus,
        folder,
        data={"validation_sets": (*sets, f"twice={corpus}/train")},
        training={"steps": 4, "eval_interval": 2, "patience": 4},
        checkpoint={"interval": 1, "keep_best": True, "best_of": "seen"},
    )


def _straight_and_resumed(kind: str, corpus: Path, folder: Path) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        pretrain(_config(kind, corpus, folder / "straight"), grid_for(1))
        pretrain(_config(kind, corpus, folder / "stopped"), grid_for(1), stops=StopAfter(3))
        pretrain(_config(kind, corpus, folder / "stopped"), grid_for(1), resume=True)
    return shown.getvalue()


@pytest.mark.parametrize("kind", [pytest.param("egpt", marks=pytest.mark.long), "gpt"])
def test_each_set_is_recorded_by_name_and_one_decides_what_is_best(
    corpus: Path, tmp_path: Path, kind: str, distributed: Distributed
) -> None:
    shown, _ = distributed(2, _straight_and_resumed, kind, corpus, tmp_path)
    assert "step 2: seen: validation loss " in shown
    assert "213 of same, 1,213 of twice" in shown
    found = {}
    for folder in (tmp_path / "straight", tmp_path / "stopped"):
        losses: dict[str, dict[int, float]] = {}
        for record in records(folder):
            for key, value in record.items():
                if key.startswith("validation_loss") and isinstance(value, float):
                    losses.setdefault(key, {})[record["step"]] = value
        found[folder.name] = losses
        assert losses["validation_loss/same"] == losses["validation_loss"]
        seen = losses["validation_loss/seen"]
        best = min(seen, key=lambda step: seen[step])
        assert (folder / "checkpoints" / "best").resolve().name == f"step_{best:08d}"
    assert found["straight"] == found["stopped"]
    assert set(found["straight"]["validation_loss/twice"]) == {2, 4}


def test_a_set_without_a_token_to_predict_is_named(corpus: Path, tmp_path: Path) -> None:
    config = run_config(
        "gpt", corpus, tmp_path, data={"validation_sets": (f"short={tmp_path}/one",)}
    )
    with ShardWriter(tmp_path / "one") as writer:
        writer.add_document(np.array([5], dtype=np.uint16))
        writer.finish()
    with pytest.raises(DataError, match=r"validation set short \(.*one\) has no token to predict"):
        PretrainingData(config)


def _go_back_behind_the_best(corpus: Path, folder: Path) -> str:
    shown = io.StringIO()
    config = run_config(
        "gpt",
        corpus,
        folder,
        training={"steps": 6, "eval_interval": 2},
        checkpoint={"interval": 1, "keep": 5, "keep_best": True},
    )
    with contextlib.redirect_stdout(shown):
        pretrain(config, grid_for(1), stops=StopAfter(5))
        assert (folder / "checkpoints" / "best").resolve().name == "step_00000004"
        (folder / "checkpoints" / "latest").write_text("step_00000003\n")
        pretrain(config, grid_for(1), resume=True, stops=StopAfter(0))
    return shown.getvalue()


def test_a_run_that_goes_back_behind_its_best_goes_back_to_an_earlier_one(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """The later one's folder is going to be another model's."""
    shown = distributed(2, _go_back_behind_the_best, corpus, tmp_path)[0]
    assert "notice: best leads to step_00000002, the best so far" in shown
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000002"


def _go_on_with_another_text(corpus: Path, folder: Path) -> str:
    shown = io.StringIO()
    first = run_config(
        "gpt",
        corpus,
        folder,
        training={"steps": 9, "eval_interval": 3, "patience": 1},
        checkpoint={"keep_best": True},
    )
    harder = dataclasses.replace(first.data, validation=(f"{folder}/harder",))
    with contextlib.redirect_stdout(shown):
        pretrain(first, grid_for(1), stops=StopAfter(6))
        pretrain(dataclasses.replace(first, data=harder), grid_for(1), resume=True)
    return shown.getvalue()


def test_the_best_is_sought_anew_on_another_text(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """Of tokens in disorder, whose losses are above the best so far and would end the run."""
    with ShardWriter(tmp_path / "harder") as writer:
        writer.add_document(np.random.default_rng(1).integers(0, 100, 300).astype(np.uint16))
        writer.finish()
    (shown,) = distributed(1, _go_on_with_another_text, corpus, tmp_path)
    assert "notice: the best is sought anew: it was chosen on something else before" in shown
    assert "ended after step" not in shown
    saved = Manifest.read(tmp_path / "checkpoints" / "step_00000009")
    assert saved.trainer["best"] == {"loss": None, "step": 0, "counted": 0, "without": 0}
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000009"
    found = validation_losses(tmp_path)
    assert found[9] > found[6]
