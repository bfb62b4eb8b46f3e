"""Saves whose files a thread writes: when they are published, and what their failures leave."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megaegpt.errors import CheckpointError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import ParamSpec
from megaegpt.training.checkpoint.host_copies import HostCopies
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.checkpoint.manifest import Topology


class _OneFile:
    """An engine whose state is a file with a number that training changes."""

    def __init__(self) -> None:
        self.grid = ProcessGrid()
        self.topology = Topology(1, 1, 2, "fp32")
        self.value = 0

    def parameter_specs(self) -> dict[str, ParamSpec]:
        return {"weight": ParamSpec((4, 2))}

    def save_state(self, folder: Path) -> list[Path]:
        return _write(folder, self.value)

    def copy_state(self, folder: Path, copies: HostCopies) -> Callable[[], list[Path]]:
        value = copies.of(self.value)
        return lambda: _write(folder, value)

    def load_state(self, folder: Path) -> None:
        self.value = int((folder / "value").read_text())

    def load_reshaped(self, folder: Path, saved: Topology, scratch: Path) -> None:
        raise AssertionError("the topology is the same")


def _write(folder: Path, value: int) -> list[Path]:
    folder.mkdir()
    (folder / "value").write_text(str(value))
    return [folder / "value"]


class _HeldBack:
    """A part of a checkpoint that is not written before it may be."""

    def __init__(self, error: Exception | None = None) -> None:
        self.may_write = threading.Event()
        self._error = error

    def __call__(self, copies: HostCopies | None) -> Callable[[Path], None]:
        return self._write

    def _write(self, folder: Path) -> None:
        assert self.may_write.wait(timeout=60)
        if self._error is not None:
            raise self._error
        folder.mkdir()
        (folder / "text").write_text("whole")


def _value_in(manager: CheckpointManager) -> int:
    engine = _OneFile()
    assert manager.load(engine) == {"step": engine.value}
    return engine.value


def _save(manager: CheckpointManager, engine: _OneFile, value: int) -> None:
    engine.value = value
    manager.save(engine, value, {"step": value})


def _begin(manager: CheckpointManager, engine: _OneFile, value: int) -> _HeldBack:
    """Begin a save and train on."""
    part = _HeldBack()
    engine.value = value
    manager.save_later(engine, value, {"step": value}, {"weights": part})
    engine.value = -1
    return part


def _advance(manager: CheckpointManager) -> Path:
    """Take steps until the checkpoint is complete."""
    deadline = time.monotonic() + 60
    while (folder := manager.advance()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return folder


def test_the_earlier_one_is_the_latest_until_all_files_are_written(tmp_path: Path) -> None:
    manager, engine = CheckpointManager(tmp_path, keep=1), _OneFile()
    assert manager.advance() is None
    _save(manager, engine, 1)
    part = _begin(manager, engine, 2)
    for _ in range(3):
        assert manager.advance() is None
    assert _value_in(manager) == 1
    part.may_write.set()
    folder = _advance(manager)
    assert folder == manager.latest() == tmp_path / "step_00000002"
    assert _value_in(manager) == 2
    assert (folder / "weights" / "text").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002"]
    assert manager.finish() is None


def test_the_next_save_waits_for_it(tmp_path: Path) -> None:
    manager, engine = CheckpointManager(tmp_path, keep=3), _OneFile()
    for value, save in ((1, _begin), (2, _save), (3, _begin)):
        part = save(manager, engine, value)
        if part is not None:
            threading.Timer(0.02, part.may_write.set).start()
    assert manager.finish() == tmp_path / "step_00000003"
    names = [path.name for path in sorted(tmp_path.glob("step_*"))]
    assert names == ["step_00000001", "step_00000002", "step_00000003"]


def test_the_best_is_marked_when_it_is_complete(tmp_path: Path) -> None:
    manager, engine = CheckpointManager(tmp_path, keep=1), _OneFile()
    part = _begin(manager, engine, 1)
    manager.mark_best(1, engine.grid)
    assert manager.best() is None
    part.may_write.set()
    _advance(manager)
    part = _begin(manager, engine, 2)
    part.may_write.set()
    manager.finish()
    assert manager.best() == tmp_path / "step_00000001"
    assert manager.latest() == tmp_path / "step_00000002"
    manager.mark_best(2, engine.grid)
    assert manager.best() == manager.latest()


@pytest.mark.parametrize("end", ["advance", "finish"])
def test_a_full_disk_is_told_as_by_a_save_that_waits(tmp_path: Path, end: str) -> None:
    manager, engine = CheckpointManager(tmp_path, keep=1), _OneFile()
    _save(manager, engine, 1)
    part = _HeldBack(OSError(28, "No space left on device", "model.safetensors"))
    manager.save_later(engine, 2, {"step": 2}, {"weights": part})
    part.may_write.set()
    with pytest.raises(CheckpointError) as raised:
        _advance(manager) if end == "advance" else manager.finish()
    assert str(raised.value) == (
        "checkpoint of step 2 was not saved: model.safetensors: No space left on device; "
        "step_00000001 is untouched"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert manager.finish() is None
    _begin(manager, engine, 3).may_write.set()
    assert manager.finish() == tmp_path / "step_00000003"


def test_killed_while_it_is_written_the_earlier_one_is_whole(tmp_path: Path) -> None:
    manager, engine = CheckpointManager(tmp_path, keep=1), _OneFile()
    _save(manager, engine, 1)
    child = os.fork()
    if child == 0:
        _begin(manager, engine, 2)
        time.sleep(60)
        os._exit(1)
    written = tmp_path / ".saving-step_00000002" / "deepspeed" / "value"
    deadline = time.monotonic() + 60
    while not written.exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert manager.latest() == tmp_path / "step_00000001"
    assert _value_in(manager) == 1
    _begin(manager, engine, 2).may_write.set()
    manager.finish()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
