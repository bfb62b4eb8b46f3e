"""What the inspection of shards tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.shard_contents import LengthHistogram, first_difference
from megaegpt.data.tokens.shards import Shard
from tests.data.corpora import write_shard
from tools import inspect_shards

TOKENIZER = Tokenizer.load()


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["inspect_shards.py", *map(str, arguments)])
    try:
        inspect_shards.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def write_texts(prefix: Path, texts: list[str]) -> str:
    return write_shard(prefix, [TOKENIZER.encode_numpy(text) for text in texts])


def test_the_histogram_counts_every_document(tmp_path: Path) -> None:
    lengths = [0, 1, 2, 3, 4, 7, 8, 1000, 1023, 1024]
    shard = Shard(write_shard(tmp_path / "s", [np.zeros(n, np.uint16) for n in lengths]))
    histogram = LengthHistogram([shard, shard])
    assert (histogram.documents, histogram.tokens) == (20, 2 * sum(lengths))
    assert histogram.longest == 1024
    rows = histogram.rows()
    assert rows[:5] == [(0, 0, 2), (1, 1, 2), (2, 3, 4), (4, 7, 4), (8, 15, 2)]
    assert rows[-2:] == [(512, 1023, 4), (1024, 2047, 2)]
    assert len(histogram.text().splitlines()) == len(rows)


def test_sets_compare_as_documents_however_they_are_cut(tmp_path: Path) -> None:
    documents = [np.array([1, 2]), np.array([3]), np.array([4, 5, 6])]
    whole = Shard(write_shard(tmp_path / "whole", documents))
    head = Shard(write_shard(tmp_path / "head", documents[:2]))
    tail = Shard(write_shard(tmp_path / "tail", documents[2:], np.int32))
    other = Shard(write_shard(tmp_path / "other", [*documents[:2], np.array([4, 9, 6])]))
    assert first_difference([whole], [head, tail]) is None
    assert first_difference([whole], [head]) == "only the first has document 2"
    assert first_difference([whole], [other]) == "token 1 of document 2 is 5 and 9"
    assert first_difference([tail], [head]) == "document 0 has 3 tokens and 2"


def test_show_prints_counts_text_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_texts(tmp_path / "s", ["The first text.", "The second, größer.", "The last."])
    picture = tmp_path / "lengths.png"
    assert call(monkeypatch, "show", prefix, "--plot", picture) == 0
    output = capsys.readouterr().out
    assert "3 documents" in output
    for text in ("The first text.", "The second, größer.", "The last."):
        assert text in output
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors(maxcolors=256) or []) > 5  # something is drawn


def test_verify_and_compare_answer_by_their_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_texts(tmp_path / "a", ["one", "two"])
    second = write_texts(tmp_path / "b", ["one", "three"])
    assert call(monkeypatch, "verify", first) == 0
    assert "whole, 2 documents" in capsys.readouterr().out
    assert call(monkeypatch, "compare", first, first) == 0
    assert call(monkeypatch, "compare", first, second) == 1
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:-1])
    assert call(monkeypatch, "verify", first) == 2
    assert "a.idx is truncated" in capsys.readouterr().err


def test_more_samples_than_documents_show_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_texts(tmp_path / "s", ["one", "two", "three"])
    assert call(monkeypatch, "show", prefix, "--samples", 10**15) == 0
    output = capsys.readouterr().out
    assert [line.split()[2] for line in output.splitlines() if line[:3] == "---"] == list("012")
    assert call(monkeypatch, "show", prefix, "--samples", 2) == 0
    output = capsys.readouterr().out
    assert [line.split()[2] for line in output.splitlines() if line[:3] == "---"] == list("02")


def test_shards_are_shown_where_no_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_texts(tmp_path / "s", ["one", "two"])
    assert call(monkeypatch, "show", prefix, "--samples", 1) == 0
    shown = capsys.readouterr().out
    for words in ([prefix, "--samples", 1], ["--samples", 1, prefix]):
        assert call(monkeypatch, *words) == 0
        assert capsys.readouterr().out == shown
    assert call(monkeypatch) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--samples", "--tokens"])
@pytest.mark.parametrize("value", ["-1", "1.5", "many"])
def test_counts_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    prefix = write_texts(tmp_path / "s", ["one"])
    assert call(monkeypatch, "show", prefix, f"{option}={value}") == 2


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_shards_without_documents_or_tokens_are_shown_verified_and_compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    documents: list[list[int]],
) -> None:
    prefix = write_shard(tmp_path / "s", [np.array(d, np.int64) for d in documents])
    assert call(monkeypatch, "show", prefix, "--png", tmp_path / "a.png") == 0
    assert call(monkeypatch, "verify", prefix) == 0
    assert call(monkeypatch, "compare", prefix, prefix) == 0
    assert f"{len(documents)} documents, 0 tokens" in capsys.readouterr().out


def test_a_picture_that_cannot_be_drawn_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_texts(tmp_path / "s", ["one"])
    (tmp_path / "full").symlink_to("/dev/full")
    for name, message in [
        ("a.foo", r"a.foo: pictures end in .avif"),
        ("a", r"a: pictures end in .avif"),
        ("nowhere/a.png", "cannot write"),
        ("full", "No space left on device"),
    ]:
        assert call(monkeypatch, "show", prefix, "--png", tmp_path / name) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "full").is_symlink()
