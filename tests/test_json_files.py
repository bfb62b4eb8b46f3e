"""Whatever a JSON file holds, it is read as expected or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest

from megaegpt import json_files
from megaegpt.errors import CheckpointError, DataError
from megaegpt.json_files import read_json, read_lines


@dataclasses.dataclass(frozen=True)
class Entry:
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    files: dict[str, Entry]
    shape: tuple[int, ...]
    loss: float | None = None
    mode: Literal["last", "mean"] = "last"
    anything: Any = None


_GOOD = {"name": "é", "files": {"a": {"size": 3, "sha256": "00"}}, "shape": [2, 3], "loss": 1}


def test_a_file_becomes_what_its_schema_says(tmp_path: Path) -> None:
    path = tmp_path / "good.json"
    for bom in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(bom + json.dumps(_GOOD, ensure_ascii=False).encode())
        assert read_json(path, Document) == Document("é", {"a": Entry(3, "00")}, (2, 3), 1.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": None}, "name must be text, not null"),
        ({"name": "a\0b"}, "name holds a NUL character"),
        ({"files": []}, "files must be an object, not a list"),
        ({"files": {"a": {"size": True, "sha256": ""}}}, "files.a.size must be an integer, not tr"),
        ({"files": {"a": {"size": 1}}}, "files.a.sha256 is missing"),
        ({"files": {"a": {"size": 1, "sha256": "", "x": 1}}}, "files.a.x"),
        ({"files": {"\0": {"size": 1, "sha256": ""}}}, "a key of files holds a NUL character"),
        ({"shape": [1, "2"]}, 'shape[1] must be an integer, not "2"'),
        ({"shape": [2**70]}, "shape[0] is too large"),
        ({"loss": float("nan")}, "loss must be a number or null, not NaN"),
        ({"loss": 10**400}, "loss must be a number or null"),
        ({"loss": []}, "loss must be a number or null, not a list"),
        ({"mode": "first"}, 'mode must be one of last, mean, not "first"'),
        ({"other": 1}, "is no key of it"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**_GOOD, **changes}))
    with pytest.raises(CheckpointError) as raised:
        read_json(path, Document, error=CheckpointError, remedy="copy it again")
    message = str(raised.value)
    assert message.startswith(f"{path} is damaged: ")
    assert told in message
    assert message.endswith("; copy it again")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no JSON at line 1"),
        (b"null", "it must be an object, not null"),
        (b"[]", "it must be an object, not a list"),
        (b'"text"', "it must be an object"),
        (b"9" * 5000, "limit"),
        (b"[" * 100_000, "nested too deep"),
        ('{"name": "é"}'.encode("latin-1"), "not UTF-8 at byte 10"),
        ('{"name": "a"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    ],
)
def test_what_is_no_document_at_all_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged") as raised:
        read_json(path, Document)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # would be waited for without end
    for path, told in (
        (tmp_path / "none", "does not exist: look again"),
        (tmp_path, "it is a folder"),
        (tmp_path / "pipe", "it is no regular file"),
        (Path("/dev/zero"), "it is no regular file"),
        (tmp_path / "a\0b", "null"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(DataError) as raised:
            read_json(path, Document, missing="look again")
        assert told in str(raised.value)


def test_a_file_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MOST_BYTES", 100)
    path = tmp_path / "large.json"
    path.write_bytes(b" " * 101)
    with pytest.raises(DataError, match="over 100 bytes"):
        read_json(path, Document)
    with pytest.raises(DataError, match=r"large\.json:1 is damaged: a line of over 100 bytes"):
        list(read_lines(path))


def test_another_programs_keys_are_passed_over_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps({**_GOOD, "transformers_version": "4.0"}))
    assert read_json(path, Document, other_keys=True).name == "é"


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert [(line, where.rsplit(":", 1)[1]) for line, where in read_lines(path)] == [
        (b'{"a": 1}\n', "1"),
        (b'{"a": 2}\n', "2"),
    ]
