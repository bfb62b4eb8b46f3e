"""The options of all programs that use a trained model."""

from __future__ import annotations

import argparse
import time
from typing import Any

import pytest

from megaegpt import bars
from megaegpt.generation import trained
from megaegpt.generation.model_options import add_model_options, load_model
from megaegpt.parallel.grid import ProcessGrid


@pytest.mark.parametrize(("rank", "told"), [(0, "loading runs/slow ...\n"), (1, "")])
def test_a_model_that_takes_long_to_load_is_named_by_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, told: str
) -> None:
    def slow(*_: Any, **__: Any) -> str:
        time.sleep(0.05)
        return "loaded"

    monkeypatch.setattr(bars, "SILENT_S", 0.0)
    monkeypatch.setattr(trained, "load_for_inference", slow)
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    arguments = parser.parse_args(["--checkpoint", "runs/slow"])
    assert load_model(arguments, ProcessGrid(dp_rank=rank)) == "loaded"
    assert capsys.readouterr().err == told
