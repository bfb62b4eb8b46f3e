"""A run that has too little memory says which settings need less, and how much less."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config.run import RunConfig
from megaegpt.errors import TrainingError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.memory_error import (
    describe,
    explaining_memory,
    is_out_of_memory,
    remedies,
)
from megaegpt.training.pretraining import pretrain
from megaegpt.training.trainer import Trainer
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import corpus, run_config

__all__ = ["corpus"]


def _config(corpus: Path, folder: Path, **training: Any) -> RunConfig:
    values = {"micro_batch_size": 4, "global_batch_size": 8} | training
    return run_config("gpt", corpus, folder, training=values)


def test_the_settings_that_help_are_named_with_what_they_save(corpus: Path, tmp_path: Path) -> None:
    lines = describe(_config(corpus, tmp_path), ProcessGrid(), None, "fp32")
    saved = [re.search(r"- (\S+): ([\d.]+) MiB less", line) for line in lines[1:-1]]
    found = {match[1]: float(match[2]) for match in saved if match}
    assert "training.micro_batch_size=2" in found
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found["training.micro_batch_size=2"] > 0


def test_remedies_keep_the_batch_and_fit_the_run(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path, micro_batch_size=6, activation_checkpointing="full")
    two = dataclasses.replace(ProcessGrid(), dp_size=2)
    config = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, zero_stage=0)
    )
    named = dict(remedies(config, two))
    stages = {"parallel.zero_stage=2", "parallel.zero_stage=3"}
    assert set(named) == {"training.micro_batch_size=3", *stages}
    assert {c.training.global_batch_size for c in named.values()} == {8}


def test_failed_allocations_are_known_on_a_gpu_and_on_a_cpu() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_lack_of_memory_ends_a_run_with_advice(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    error = RuntimeError("[enforce] data. DefaultCPUAllocator: can't allocate memory: 8 bytes")
    (message,) = distributed(1, _run_short_of_memory, _config(corpus, tmp_path), error)
    first, *rest = message.splitlines()
    assert re.fullmatch(r"cpu has too little memory: .*llocate.*", first)
    assert any("training.micro_batch_size=2" in line for line in rest)


def _run_short_of_memory(config: RunConfig, error: RuntimeError) -> str:
    def fails(_: Trainer) -> bool:
        raise error

    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(None):
        patched.setattr(Trainer, "train", fails)
        with pytest.raises(TrainingError) as caught:
            pretrain(config, grid_for(1))
    return str(caught.value)


def test_other_errors_pass(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path)
    with (
        pytest.raises(RuntimeError, match="shapes"),
        explaining_memory(config, ProcessGrid(), None, "fp32"),
    ):
        raise RuntimeError("shapes do not fit")
