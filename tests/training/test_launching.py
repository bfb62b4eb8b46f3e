"""How the programs that train start."""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import pytest

from megaegpt.training import launching


def test_garbage_is_collected_while_a_run_trains_and_not_while_it_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collected: dict[str, bool] = {}

    def find_train() -> Any:
        collected["importing"] = gc.isenabled()
        return None

    def start_run(*_: object) -> bool:
        collected["training"] = gc.isenabled()
        return True

    monkeypatch.setattr(launching, "start_run", start_run)
    monkeypatch.setattr(sys, "argv", ["", "--config", "gpt_encoder_cpu"])
    launching.launch(None, time.monotonic(), find_train)
    assert collected == {"importing": False, "training": True}


def test_a_dry_run_chooses_the_micro_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["model.num_layers=1", "training.global_batch_size=4", "training.micro_batch_size=auto"]
    monkeypatch.setattr(sys, "argv", ["", "--config", "gpt_encoder_cpu", "--dry-run", *run])
    monkeypatch.setenv("WORLD_SIZE", "2")
    launching.launch(None, time.monotonic(), lambda: None)  # type: ignore[arg-type, return-value]
    shown = capsys.readouterr().out
    assert "2 ranks x 1 micro-steps x 2" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("batch ")]
    assert "training.micro_batch_size=auto is 2: by the plan a step takes " in line
    assert "among 2 ranks" in line
