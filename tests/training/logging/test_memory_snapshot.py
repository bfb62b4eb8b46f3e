"""A GPU's lack of memory leaves an account of what lay there; torch's functions are played."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config import LoggingConfig, ModelConfig, TrainingConfig
from megaegpt.config.run import RunConfig
from megaegpt.errors import TrainingError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.logging.memory_snapshot import MemorySnapshot
from megaegpt.training.memory_error import explaining_memory

GPU = dataclasses.replace(ProcessGrid(), device=torch.device("cuda", 0))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch is asked to record."""
    asked: list[Any] = []

    def record(enabled: str | None = "all", **_: object) -> None:
        asked.append(enabled)

    def dump(filename: str) -> None:
        Path(filename).write_bytes(b"history")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda _: "summary")
    return asked


def _logging(folder: Path, **changes: Any) -> LoggingConfig:
    return LoggingConfig(directory=str(folder), **{"memory_snapshot": True, **changes})


def test_a_lack_of_memory_names_the_snapshot_and_how_to_look_at_it(
    tmp_path: Path, recorded: list[Any]
) -> None:
    config = RunConfig(
        model=ModelConfig(vocab_size=50, max_seq_len=64, hidden_size=64, num_layers=1, num_heads=1),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=8),
        logging=_logging(tmp_path),
    )
    snapshot = MemorySnapshot(config.logging, GPU)
    snapshot.start()
    with (
        pytest.raises(TrainingError) as caught,
        explaining_memory(config, GPU, None, "fp32", snapshot),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    snapshot.stop()
    assert recorded == ["all", None]
    message = str(caught.value)
    assert "- training.micro_batch_size=4: " in message
    assert (tmp_path / "memory_rank0.pickle").read_bytes() == b"history"
    assert f"torch.cuda._memory_viz trace_plot {tmp_path / 'memory_rank0.pickle'}" in message
    assert (tmp_path / "memory_rank0.txt").read_text() == "summary"
    assert f"what lay in memory: {tmp_path / 'memory_rank0.txt'}" in message


def test_without_the_option_nothing_is_recorded(tmp_path: Path, recorded: list[Any]) -> None:
    snapshot = MemorySnapshot(_logging(tmp_path, memory_snapshot=False), GPU)
    snapshot.start()
    lines = snapshot.write()
    snapshot.stop()
    assert recorded == []
    assert [path.name for path in tmp_path.iterdir()] == ["memory_rank0.txt"]
    assert len(lines) == 1


def test_a_cpu_has_no_such_account(tmp_path: Path, recorded: list[Any]) -> None:
    snapshot = MemorySnapshot(_logging(tmp_path), ProcessGrid())
    snapshot.start()
    assert snapshot.write() == []
    assert recorded == []
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_that_cannot_be_written_is_not_named_and_leaves_nothing(
    tmp_path: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dump(filename: str) -> None:
        Path(filename).write_bytes(b"hist")
        raise RuntimeError("no space")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    (tmp_path / "memory_rank0.pickle").write_bytes(b"an earlier run's")
    lines = MemorySnapshot(_logging(tmp_path), GPU).write()
    assert not any(".pickle" in line for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"memory_rank0.txt", "memory_rank0.pickle"}
