"""Records of an earlier run in the folder of a new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.errors import DataError
from megaegpt.training.logging.earlier import set_aside_records
from tests.tiny.runs import records


def leave_records(folder: Path, step: int) -> None:
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text(str(step))
    (folder / "config.yaml").write_text(f"training: {{steps: {step}}}")
    (folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')


def test_records_of_each_earlier_run_are_kept_whole_and_apart(tmp_path: Path) -> None:
    for step in (1, 2):
        leave_records(tmp_path, step)
        assert set_aside_records(tmp_path) == tmp_path / f"earlier_{step}"
        assert not (tmp_path / "metrics.jsonl").exists()
        assert not (tmp_path / "tensorboard").exists()
        assert (tmp_path / "config.yaml").exists()
    for step in (1, 2):
        kept = tmp_path / f"earlier_{step}"
        assert records(kept) == [{"step": step}]
        assert (kept / "tensorboard" / "events").read_text() == str(step)
        assert (kept / "config.yaml").read_text() == f"training: {{steps: {step}}}"


def test_a_folder_without_records_stays_as_it_is(tmp_path: Path) -> None:
    assert set_aside_records(tmp_path / "absent") is None
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "tensorboard").mkdir()
    assert set_aside_records(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_records_that_cannot_be_moved_are_an_error_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_records(tmp_path, 1)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(DataError, match=r"cannot write .*earlier_1: Permission denied"):
        set_aside_records(tmp_path)
    assert records(tmp_path) == [{"step": 1}]
