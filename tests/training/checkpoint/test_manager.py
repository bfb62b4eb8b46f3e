"""What a checkpoint directory looks like after kills, damage and many saves."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megaegpt.errors import CheckpointError
from megaegpt.files import MissingFeatureWarning
from megaegpt.model.weights import find_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import ParamSpec
from megaegpt.training.checkpoint import manifest
from megaegpt.training.checkpoint.folders import find_checkpoint
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.checkpoint.manifest import Topology

_FILES = 2


class _FilesOnly:
    """An engine whose state is a few small files that hold its step."""

    def __init__(self, step: int = 0) -> None:
        self.grid = ProcessGrid()
        self.topology = Topology(1, 1, 2, "fp32")
        self.step = step

    def parameter_specs(self) -> dict[str, ParamSpec]:
        return {"weight": ParamSpec((4, 2))}

    def save_state(self, folder: Path) -> list[Path]:
        folder.mkdir()
        paths = [folder / f"part_{number}" for number in range(_FILES)]
        for path in paths:
            path.write_text(f"{self.step}" * 2000)
        return paths

    def load_state(self, folder: Path) -> None:
        contents = {path.read_text() for path in folder.iterdir()}
        assert len(contents) == 1, "files of several checkpoints"
        self.step = int(contents.pop()[0])

    def load_reshaped(self, folder: Path, saved: Topology, scratch: Path) -> None:
        raise AssertionError("the topology is the same")


def _save(manager: CheckpointManager, step: int) -> Path:
    parts = {"weights": lambda copies: lambda folder: _write_weights(folder, step)}
    return manager.save(_FilesOnly(step % 10), step, {"step": step}, parts)


def _write_weights(folder: Path, step: int) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text(str(step))


def _load(manager: CheckpointManager, folder: Path | None = None) -> int:
    engine = _FilesOnly()
    step = manager.load(engine, folder)["step"]
    assert engine.step == step % 10
    return step


def test_the_last_checkpoint_is_loaded_and_only_so_many_are_kept(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "new" / "folder", keep=2)
    assert manager.latest() is None
    for step in (1, 2, 3, 4):
        folder = _save(manager, step)
        assert manager.latest() == folder
        assert _load(manager) == step
        assert (folder / "weights" / "model.safetensors").read_text() == str(step)
    names = sorted(p.name for p in manager.directory.iterdir())
    assert names == ["latest", "step_00000003", "step_00000004"]
    assert _load(manager, manager.directory / "step_00000003") == 3


def test_the_best_is_kept_beside_the_last_ones_until_another_one_is(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    assert manager.best() is None
    for step in (1, 2, 3):
        _save(manager, step)
        if step == 2:
            manager.mark_best(step, ProcessGrid())
    assert manager.best() == tmp_path / "step_00000002"
    assert _load(manager, tmp_path / "best") == 2, "the link serves as a folder"
    assert _load(manager) == 3
    manager.mark_best(3, ProcessGrid())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "step_00000003"]
    _save(manager, 3)
    assert manager.best() == manager.latest() == tmp_path / "step_00000003"


def test_a_best_that_leads_nowhere_is_no_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    _save(manager, 1)
    for target in ("step_00000009", "../elsewhere", "latest"):
        (tmp_path / "best").unlink(missing_ok=True)
        (tmp_path / "best").symlink_to(target)
        assert manager.best() is None
    _save(manager, 2)
    assert _load(manager) == 2


def test_without_links_best_is_a_file_that_names_it_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(self: Path, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(self))

    manager = CheckpointManager(tmp_path, keep=1)
    _save(manager, 1)
    manager.mark_best(1, ProcessGrid())  # a link that is replaced
    monkeypatch.setattr(Path, "symlink_to", no_links)
    _save(manager, 2)
    with pytest.warns(MissingFeatureWarning, match="no links") as warnings:
        manager.mark_best(2, ProcessGrid())
    assert len(warnings) == 1
    _save(manager, 3)
    best = tmp_path / "best"
    assert best.read_text() == "step_00000002\n"
    assert manager.best() == find_checkpoint(best) == tmp_path / "step_00000002"
    (tmp_path / "step_00000002" / "weights" / "config.json").write_text("{}")
    assert find_weights(best) == tmp_path / "step_00000002" / "weights"


def test_a_file_system_without_durable_folders_still_takes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    manager = CheckpointManager(tmp_path, keep=1)
    with pytest.warns(MissingFeatureWarning, match="durable folders"):
        _save(manager, 1)
    assert _load(manager) == 1


def test_a_checkpoint_under_another_step_s_name_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    _save(manager, 1)
    _save(manager, 2)
    shutil.rmtree(tmp_path / "step_00000002")
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match="step_00000002 holds the checkpoint of step 1"):
        _load(manager)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000001")
    assert _load(manager) == 1
    (tmp_path / "step_00000001").rename(tmp_path / "kept")
    assert _load(manager, tmp_path / "kept") == 1, "any other name says no step"


def test_saving_again_at_an_earlier_step_keeps_the_new_one(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    for step in (5, 9, 6, 6):
        _save(manager, step)
        assert _load(manager) == step


def test_no_checkpoint_at_all_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        CheckpointManager(tmp_path, keep=1).load(_FilesOnly())


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: manifest\.json"):
        CheckpointManager(tmp_path, keep=1).load(_FilesOnly(), tmp_path)


def test_a_lost_or_wrong_latest_falls_back_to_the_newest_complete_one(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=3)
    for step in (1, 2):
        _save(manager, step)
    for content in (b"step_00000777", b"", b"../../etc", b"\xff\xfe"):
        (tmp_path / "latest").write_bytes(content)
        assert _load(manager) == 2
    (tmp_path / "latest").unlink()
    assert _load(manager) == 2


def test_the_latest_is_kept_though_a_clock_says_that_it_is_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines of a cluster disagree about the time; a run may go on on another one."""
    for keep in (1, 2):
        manager = CheckpointManager(tmp_path / str(keep), keep=keep)
        for step in (1, 2, 3):
            monkeypatch.setattr(time, "time_ns", lambda step=step: 10**18 - step)
            _save(manager, step)
            assert _load(manager) == step
        assert len(list(manager.directory.glob("step_*"))) == keep


def test_those_of_every_so_many_steps_are_kept_for_good_and_do_not_count(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        _save(manager, step)
    kept = [int(path.name[-8:]) for path in sorted(tmp_path.glob("step_*"))]
    assert kept == [4, 8, 10, 11]


def test_the_last_good_one_stays_while_others_are_damaged(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (1, 2):
        _save(manager, step)
    (tmp_path / "step_00000002" / "manifest.json").write_text("{}")
    (tmp_path / "latest").write_text("step_00000001\n")
    _save(manager, 3)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003"]


def test_going_back_by_editing_latest_is_respected(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=3)
    for step in (1, 2):
        _save(manager, step)
    (tmp_path / "latest").write_text("step_00000001")
    assert _load(manager) == 1


def test_going_back_leads_best_to_what_is_the_best_up_to_there(tmp_path: Path) -> None:
    """Its later folder is going to be another branch's."""
    manager, grid = CheckpointManager(tmp_path, keep=3), ProcessGrid()
    assert manager.restore_best(1, grid) is None
    for step in (1, 2, 3):
        _save(manager, step)
    manager.mark_best(3, grid)
    assert manager.restore_best(3, grid) is None
    notice = manager.restore_best(1, grid)
    assert notice == "notice: best leads to step_00000001, the best so far"
    assert manager.best() == tmp_path / "step_00000001"
    manager.mark_best(3, grid)
    shutil.rmtree(tmp_path / "step_00000001")
    notice = manager.restore_best(1, grid)
    assert notice == "notice: best leads nowhere: step_00000001, the best so far, is not kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("latest", "step_00000002", "step_00000003")
    ]


def test_a_failing_writer_leaves_no_trace(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device", str(folder / "model.safetensors"))

    manager = CheckpointManager(tmp_path, keep=1)
    _save(manager, 1)
    with pytest.raises(CheckpointError, match=r"No space left.*step_00000001 is untouched"):
        manager.save(_FilesOnly(2), 2, {"step": 2}, {"weights": lambda copies: fails})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert _load(manager) == 1


def test_a_full_disk_while_weights_are_exported_is_said_so(tmp_path: Path) -> None:
    """safetensors has an exception of its own for it."""
    manager = CheckpointManager(tmp_path, keep=1)
    _save(manager, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"too large.*step_00000001 is untouched"):
            manager.save(
                _FilesOnly(2), 2, {"step": 2}, {"weights": lambda copies: _write_many_weights}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def _write_many_weights(folder: Path) -> None:
    folder.mkdir()
    save_file({"weight": torch.zeros(100, 100)}, folder / "model.safetensors")


@pytest.mark.parametrize("again", [False, True], ids=["next_step", "same_step"])
def test_a_disk_full_at_any_file_operation_of_a_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    _save(manager, 1)
    step = 1 if again else 2
    for operation in range(1, 200):

        def full(path: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", path)

        said = ""
        with monkeypatch.context() as patch:
            _fail_at(operation, full, patch, needing_space=True)
            try:
                _save(manager, step)
            except CheckpointError as error:
                said = str(error)
        if not said:
            break
        assert f"step {step} was not saved: " in said
        assert "No space left on device; step_0000000" in said
        assert _load(manager) in (1, step)
        assert {p.name for p in tmp_path.glob(".*")} <= {f".replaced-step_{step:08d}"}
    else:
        raise AssertionError("the save never finished")
    assert operation > 10, "operations were not counted"
    assert _load(manager) == step


@pytest.mark.parametrize("again", [False, True], ids=["next_step", "same_step"])
def test_dying_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, again: bool
) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    _save(manager, 1)
    survivor = 1
    for operation in range(1, 200):
        step = survivor if again else survivor + 1
        finished = _run_in_a_child(lambda step=step, n=operation: _save_and_die(manager, step, n))
        assert _load(manager) in (survivor, step)
        survivor = _load(manager)
        if finished:
            break
    else:
        raise AssertionError("the save never finished")
    assert operation > 20, "operations were not counted"
    _save(manager, survivor + 1)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_killed_at_random_moments_the_last_whole_checkpoint_is_found(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    _save(manager, 1)
    timing = random.Random(7)
    before = 1
    for kills in itertools.count():
        if kills >= 12 and before > 2:
            break
        assert kills < 1000, "nothing was saved between the kills"
        child = os.fork()
        if child == 0:
            for step in range(before + 1, before + 10_000):
                _save(manager, step)
        time.sleep(timing.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = _load(manager)
        assert now >= before
        before = now


def _run_in_a_child(action: Callable[[], None]) -> bool:
    """Whether ``action`` ended by itself (and not by :func:`_save_and_die`'s exit)."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), "the save failed instead of dying"
    return code == 0


def _save_and_die(manager: CheckpointManager, step: int, operation: int) -> None:
    """Exit at once, as ``kill -9`` does, before the ``operation``-th change of a file or folder."""
    with pytest.MonkeyPatch.context() as patch:
        _fail_at(operation, lambda path: os._exit(9), patch)
        _save(manager, step)


def _fail_at(
    operation: int,
    fail: Callable[[str], None],
    patch: pytest.MonkeyPatch,
    needing_space: bool = False,
) -> None:
    """Call ``fail`` in place of the ``operation``-th change of a file or folder from now on."""
    count, opened = 0, Path.open

    def failing(original: Callable[..., object]) -> Callable[..., object]:
        def changed(path: object, *args: object, **kwargs: object) -> object:
            nonlocal count
            if original is opened and not set("wax+") & set(kwargs.get("mode", (*args, "r")[0])):
                return original(path, *args, **kwargs)  # reading changes nothing
            count += 1
            if count == operation:
                fail(str(path))
            return original(path, *args, **kwargs)

        return changed

    methods = ["mkdir", "rename", "replace", "write_text", "open"]
    functions = ["fsync"] if needing_space else ["fsync", "unlink", "rmdir"]
    for place, names in ((Path, methods), (os, functions)):
        for name in names:
            patch.setattr(place, name, failing(getattr(place, name)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> CheckpointManager:
    manager = CheckpointManager(tmp_path_factory.mktemp("checkpoints"), keep=1)
    _save(manager, 1)
    return manager


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_changed_byte_or_cut_is_found_and_the_file_named(
    saved: CheckpointManager, data: st.DataObject
) -> None:
    files = sorted(p for p in saved.directory.glob("step_*/**/*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    content = bytearray(original)
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    path.write_bytes(content)
    try:
        if path.name == manifest.MANIFEST and _same_json(path):
            return
        with pytest.raises(CheckpointError) as caught:
            saved.load(_FilesOnly())
        assert path.name in str(caught.value)
    finally:
        path.write_bytes(original)


def _same_json(path: Path) -> bool:
    """Whether a change of the manifest was only one of its spaces."""
    try:
        document = json.loads(path.read_bytes())
        body = {k: v for k, v in document.items() if k not in ("format", "sha256")}
        return document["format"] == 1 and document["sha256"] == manifest.digest_of(body)
    except (ValueError, LookupError, AttributeError, TypeError):
        return False


def test_another_model_is_refused_by_parameter(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    _save(manager, 1)
    engine = _FilesOnly()
    engine.parameter_specs = lambda: {"weight": ParamSpec((4, 3))}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"weight is \[4, 2\] there and \[4, 3\]"):
        manager.load(engine)
