"""``training.deterministic``: what it switches on, and that a run works under it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaegpt.errors import ConfigError
from megaegpt.training.engine.deterministic import make_deterministic

ROOT = Path(__file__).parents[3]

_PROGRAM = """
import os, sys, torch
from dataclasses import replace
from pathlib import Path
from megaegpt.parallel.launch import joined_processes
from megaegpt.training.pretraining import pretrain
from tests.tiny.runs import losses, run_config, write_corpus, write_encoder

folder = Path(sys.argv[1])
write_corpus(folder)
write_encoder(folder / "encoder")
short = {"steps": 3, "global_batch_size": 2, "eval_interval": 3}
with joined_processes(1) as grid:
    for deterministic in (False, True):
        run = folder / str(deterministic)
        training = {**short, "deterministic": deterministic}
        pretrain(
            run_config(
                "egpt", folder, run, training=training,
                logging={"directory": str(run), "interval": 1},
            ),
            grid,
        )
        if not deterministic:
            assert not torch.are_deterministic_algorithms_enabled()
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled()
assert not torch.backends.cudnn.benchmark
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert len(losses(folder / "True")) == 3
assert losses(folder / "True") == losses(folder / "False")
"""


def test_a_deterministic_run_sets_its_switches_and_has_the_losses_of_another_on_a_cpu(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_workspace_that_is_not_repeatable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG to be one of .*, not ':0:0'"):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
