"""A run that has too little memory says which settings need less, and how much less."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaegpt.config.run import RunConfig
from megaegpt.errors import TrainingError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training import pretraining
from megaegpt.training.engine.engine import Engine
from megaegpt.training.logging.memory_snapshot import MemorySnapshot
from megaegpt.training.memory_error import (
    describe,
    explaining_memory,
    is_out_of_memory,
    remedies,
)
from megaegpt.training.pretraining import pretrain
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


def test_what_would_be_refused_is_no_remedy(corpus: Path, tmp_path: Path) -> None:
    """Stored predictions, for one, are not for ZeRO stage 3."""
    config = run_config("egpt", corpus, tmp_path, training={"micro_batch_size": 2})
    egpt = dataclasses.replace(config.model.egpt, token_memory=True)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, egpt=egpt))
    two = dataclasses.replace(ProcessGrid(), dp_size=2)
    assert "parallel.zero_stage=3" in dict(remedies(config, two))
    data = dataclasses.replace(config.data, predictions="stored")
    named = dict(remedies(dataclasses.replace(config, data=data), two))
    assert named
    assert "parallel.zero_stage=3" not in named


def _allocate_on_cpu() -> None:
    torch.empty(2**50, dtype=torch.uint8)  # more than there are addresses


def _allocate_by_numpy() -> None:
    np.empty(2**50, dtype=np.uint8)


def _allocate_on_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")


@pytest.mark.parametrize("allocate", [_allocate_on_cpu, _allocate_by_numpy, _allocate_on_gpu])
def test_a_failed_allocation_is_known(allocate: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), True),
        (RuntimeError("shapes do not fit"), False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (ValueError("Cannot allocate memory"), False),
    ],
)
def test_errors_of_other_allocators_are_told_from_others(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def _ends_of_runs(config: RunConfig) -> list[str]:
    """What is said of a lack of memory in a step, or as the engine or the model is made."""
    messages = []
    for place, name, allocate in (
        (Engine, "train_step", _allocate_on_cpu),
        (Engine, "__init__", _allocate_on_gpu),
        (pretraining, "starting_model", _allocate_on_gpu),
    ):
        with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(None):
            patched.setattr(place, name, lambda *_, allocate=allocate, **__: allocate())
            with pytest.raises(TrainingError) as caught:
                pretrain(config, grid_for(1))
        messages.append(str(caught.value))
    return messages


def test_a_lack_of_memory_ends_a_run_with_advice(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (messages,) = distributed(1, _ends_of_runs, _config(corpus, tmp_path))
    assert len(messages) == 3
    for message in messages:
        first, *rest = message.splitlines()
        assert re.fullmatch(r"cpu has too little memory: .*llocate.*", first)
        assert any("training.micro_batch_size=2" in line for line in rest)


def test_other_errors_pass(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path)
    snapshot = MemorySnapshot(config.logging, ProcessGrid())
    with (
        pytest.raises(RuntimeError, match="shapes"),
        explaining_memory(config, ProcessGrid(), None, "fp32", snapshot),
    ):
        raise RuntimeError("shapes do not fit")
