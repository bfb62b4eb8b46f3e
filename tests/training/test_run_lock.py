"""The same run started twice: the second says who is at work, and the first is unharmed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from megaegpt.errors import DataError, FolderInUseError
from megaegpt.files import LOCK, locked_folder
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training import run_lock
from megaegpt.training.run_lock import locked_folders
from tests.distributed.harness import Distributed, grid_for


def test_a_second_run_names_the_process_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_S", 0.0)
    checkpoints = tmp_path / "run" / "checkpoints"
    with locked_folders([tmp_path / "run", checkpoints], ProcessGrid()):
        for shared in (tmp_path / "run", checkpoints):
            with (
                pytest.raises(FolderInUseError) as raised,
                locked_folders([tmp_path / "other", shared], ProcessGrid()),
            ):
                pass
            message = str(raised.value)
            assert message.startswith(f"{shared} is being written by another run (process ")
            assert f"process {os.getpid()} on " in message
            assert "logging.directory" in message
            assert not (tmp_path / "other").exists()
        (checkpoints / "latest").write_text("step_00000001")
    assert [path.name for path in checkpoints.iterdir()] == ["latest"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_run_that_is_about_to_end_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = locked_folder(tmp_path)
    held.__enter__()
    timer = threading.Timer(0.3, held.__exit__, (None, None, None))
    timer.start()
    with locked_folders([tmp_path], ProcessGrid()):
        assert (tmp_path / LOCK).exists()
    timer.join()
    assert capsys.readouterr().out.count("waiting 60 s for its end") == 1


def test_a_run_that_wrote_nothing_leaves_no_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    with pytest.raises(DataError, match="no shards"), locked_folders(folders, ProcessGrid()):
        raise DataError("no shards")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = r"cannot write .*file/run: Not a directory"
    folders = [tmp_path / "file" / "run"]
    with pytest.raises(DataError, match=told), locked_folders(folders, ProcessGrid()):
        pass


def _refused(folder: Path) -> str:
    run_lock.WAIT_S = 0.0
    with pytest.raises(DataError) as raised, locked_folders([folder], grid_for(2)):
        pass
    return str(raised.value)


def test_all_ranks_are_told(tmp_path: Path, distributed: Distributed) -> None:
    with locked_folder(tmp_path):
        for message in distributed(2, _refused, tmp_path):
            assert "is being written by another run" in message
