"""Weights & Biases: what it is told, offline runs, resuming, and one clear error without it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megaegpt.config import LoggingConfig, RunConfig, TrainingConfig
from megaegpt.errors import ConfigError
from megaegpt.evaluation.text_loss import Evaluation
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.command_line import RunParser
from megaegpt.training.logging.monitor import Monitor

EVALUATION = Evaluation(loss=3.0, nats_per_byte=0.9, tokens=100, loss_by_chunk=(3.5, 2.5))


class StandIn(ModuleType):
    """The part of wandb that is used; it remembers what it is told."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.refusal = refusal
        self.started: list[dict[str, Any]] = []
        self.points: list[dict[str, Any]] = []
        self.axes: list[Any] = []
        self.configs: list[dict[str, Any]] = []
        self.finished = 0
        self.config = self

    def init(self, **arguments: Any) -> StandIn:
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.started.append(arguments)
        return self

    def define_metric(self, *arguments: Any, **options: Any) -> None:
        self.axes.append((arguments, options))

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change, "a resumed run may differ"
        self.configs.append(values)

    def log(self, values: dict[str, Any]) -> None:
        self.points.append(values)

    def finish(self) -> None:
        self.finished += 1

    def Html(self, text: str, inject: bool) -> tuple[str, str]:  # noqa: N802
        return "html", text

    def Image(self, pixels: Any) -> tuple[str, Any]:  # noqa: N802
        return "image", pixels


def _monitor(folder: Path, done: int = 0, mode: Any = "offline") -> Monitor:
    config = LoggingConfig(
        directory=str(folder), tensorboard=False, wandb=mode, wandb_project="chunks"
    )
    return Monitor(config, ProcessGrid(), done)


def test_it_is_told_what_the_records_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = _monitor(tmp_path / "small")
    run.configuration(RunConfig(training=TrainingConfig(steps=7)))
    run.training(1, {"loss": 4.0, "tokens_per_second": 90.0, "memory_gib": 0.5, "mfu": None})
    run.validation(1, EVALUATION)
    run.text("sample", "a < b", 1)
    run.close()
    (started,) = wandb.started
    assert (started["project"], started["name"], started["mode"]) == ("chunks", "small", "offline")
    assert started["dir"] == str(tmp_path / "small")
    assert (("*",), {"step_metric": "step"}) in wandb.axes
    assert wandb.configs[0]["training"]["steps"] == 7
    assert all(point["step"] == 1 for point in wandb.points)
    told = {name: value for point in wandb.points for name, value in point.items()}
    assert told["training/loss"] == 4.0
    assert (told["training/tokens_per_second"], told["training/memory_gib"]) == (90.0, 0.5)
    assert (told["validation/loss"], told["validation_by_chunk/01"]) == (3.0, 2.5)
    kind, image = told["validation/loss_by_chunk"]
    assert kind == "image"
    assert image.ndim == 3
    assert image.std() > 0, "something is drawn"
    assert told["sample"] == ("html", "<pre>a &lt; b</pre>")
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_under_its_id_and_a_new_one_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for done in (0, 5, 0):
        _monitor(tmp_path, done).close()
    first, resumed, new = (arguments["id"] for arguments in wandb.started)
    assert first == resumed != new
    assert all(arguments["resume"] == "allow" for arguments in wandb.started)


def test_a_refused_run_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn("no API key\n  configured."))
    with pytest.raises(
        ConfigError, match=r"logging\.wandb=online: no API key configured\.; log in"
    ):
        _monitor(tmp_path, mode="online")


def test_without_the_package_there_is_one_error_also_in_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"logging\.wandb=offline needs the package wandb: pip"):
        _monitor(tmp_path)
    (tmp_path / "run.yaml").write_text("logging: {wandb: online}")
    parser = RunParser("a program")
    monkeypatch.setattr(sys, "argv", ["program", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ConfigError, match=r"logging\.wandb=online needs the package") as caught:
        parser.parse_run()
    assert caught.value.on_every_rank


def test_the_real_package_keeps_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("matplotlib")
    for done in (0, 1):
        run = _monitor(tmp_path, done)
        run.configuration(RunConfig())
        run.training(done + 1, {"loss": 4.0 - done})
        run.validation(done + 1, EVALUATION)
        run.text("sample", "words", done + 1)
        run.close()
    name = (tmp_path / "wandb_id").read_text()
    kept = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert kept
    assert all(path.stat().st_size > 0 for path in kept)
    images = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/validation/*.png"))
    assert len(images) == 2
