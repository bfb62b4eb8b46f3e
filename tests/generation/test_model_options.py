"""The options of all programs that use a trained model."""

from __future__ import annotations

import argparse
import time
from typing import Any

import pytest
import torch

from megaegpt import bars
from megaegpt.generation import trained
from megaegpt.generation.model_options import add_model_options, load_model
from megaegpt.parallel import affinity
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


def test_a_program_of_one_process_has_no_more_threads_than_its_containers_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", affinity.CHOICE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(affinity, "cpu_quota", lambda: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(trained, "load_for_inference", lambda *_, **__: None)
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    load_model(parser.parse_args(["--checkpoint", "runs/any"]))
    assert threads == [1]
