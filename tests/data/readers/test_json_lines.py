"""JSON Lines, plain text and what they share: compression, damage, order of chunks."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megaegpt.data.readers import inputs
from megaegpt.errors import DataError
from tests.data.readers.reading import read, read_skipping, texts

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_text_position_and_identity_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"text": "Grüße", "id": 7, "score": 0.5, "meta": {"title": "T"}}
    path.write_bytes(lines(row) + b"\n" + lines({"text": "b"}))
    first, second = read("jsonl", path)
    assert (first.text, first.where) == ("Grüße", f"{path}, line 1")
    assert first.metadata == {"id": 7, "title": "T"}
    assert (second.text, second.position) == ("b", "line 3")


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"maintext": "a"}))
    assert texts(read("jsonl", path, text_column="maintext")) == ["a"]
    with pytest.raises(
        DataError, match=r"line 1: no text column 'text'; the columns are 'maintext'"
    ):
        read("jsonl", path)


def test_chunks_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 1, 2):
        (tmp_path / f"fr_chunk{number}.jsonl").write_bytes(lines({"text": f"morceau {number}"}))
    (tmp_path / "README.md").write_text("not data")
    assert texts(read("transwebedu", tmp_path)) == ["morceau 1", "morceau 2", "morceau 10"]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b"{oops}\n", "not JSON"),
        (b'["list"]\n', "a JSON list, not an object"),
        (b'{"text": null}\n', "column 'text' is empty"),
        (b'{"text": " "}\n', "column 'text' is empty"),
        (b'{"text": 3}\n', "of type int, not a string"),
        (b'{"other": 3}\n', "no text column 'text'"),
        (b'{"text": "\xe9"}\n', "not UTF-8 at byte 10"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b'{"text": "cut of', "the file ends within this line: not JSON"),
    ],
)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, bad: bytes, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "good"}) + bad)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: ") as raised:
        read("jsonl", path)
    assert what in str(raised.value)
    documents, problems = read_skipping("jsonl", path)
    assert texts(documents) == ["good"]
    assert problems.count == 1


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_are_read_and_truncated_ones_noticed(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"text": f"{n} " + "".join(chr(97 + (n * k) % 26) for k in range(99))} for n in range(999)
    ]
    whole = COMPRESSORS[suffix](lines(*rows))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole)
    assert texts(read("jsonl", path)) == [row["text"] for row in rows]

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix}.*(truncated|ends within)"):
        read("jsonl", path)
    documents, problems = read_skipping("jsonl", path)
    assert texts(documents) == [row["text"] for row in rows[: len(documents)]]
    assert problems.count >= 1


def test_several_zstandard_frames_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.compress(lines({"text": letter})) for letter in "abc"]
    path.write_bytes(b"".join(frames))
    assert texts(read("jsonl", path)) == ["a", "b", "c"]


def test_a_zstandard_frame_of_the_longest_window_is_read(tmp_path: Path) -> None:
    """As `zstd --long=31` writes it: the magic number, a window of 2 GiB, a block as it is."""
    text = lines({"text": "hello"})
    block = (len(text) << 3 | 1).to_bytes(3, "little")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + block + text)
    assert texts(read("jsonl", path)) == ["hello"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "EXPANSION_FREE_BYTES", 1 << 20)
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](bytes(1 << 24)))
    with pytest.raises(DataError, match=r"bomb.*expands more than 100-fold"):
        read("jsonl", path)


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_DOCUMENT_BYTES", 1_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b" " * 5_000)
    with pytest.raises(DataError, match=r"line 1: longer than 1,000 bytes"):
        read("jsonl", path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt.gz").write_bytes(gzip.compress("zwei\r\n\r\nÜ".encode()))
    (tmp_path / "a.txt").write_text("\ufeffone\n", encoding="utf-8")
    assert texts(read("text", tmp_path)) == ["one\n", "zwei\n\nÜ"]


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"\xff\xfa", "not UTF-8 at byte 0"), (b"\xff\xfea\0", "in UTF-16"), (b" ", "empty")],
)
def test_a_bad_text_file_is_named_or_counted(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt: .*{what}"):
        read("text", path)
    assert read_skipping("text", path)[1].count == 1


def test_a_zstandard_bomb_comes_out_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bytes of it can stand for 128 KiB: what is read at once bounds what comes out."""
    bomb = zstandard.compress(bytes(1 << 30))
    monkeypatch.setattr(inputs, "EXPANSION_FREE_BYTES", 1 << 40)
    pieces = inputs.ZstdStream(io.BytesIO(bomb))
    largest = 0
    for _ in range(3):
        largest = max(largest, len(pieces.read()))
    assert 1 << 20 < largest <= 1 << 27


def test_a_json_array_over_several_lines_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "one"}\n]\n')
    with pytest.raises(DataError, match="line 1: a JSON array over several lines: write one"):
        read("jsonl", tmp_path / "a.json")


@pytest.mark.parametrize(("encoding", "bad"), [("utf-16", 1), ("utf-16-le", 3), ("utf-16-be", 2)])
def test_no_line_of_utf_16_is_read_by_luck(tmp_path: Path, encoding: str, bad: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "a"}, {"text": "b"}).decode().encode(encoding))
    with pytest.raises(DataError, match=r"a\.jsonl: text in UTF-16" if bad == 1 else "line 1: not"):
        read("jsonl", path)
    documents, problems = read_skipping("jsonl", path)
    assert (documents, problems.count) == ([], bad)


class _WholeAtOnce(io.BytesIO):
    """Like Zstandard's stream, it gives more than was asked for."""

    def read1(self, _: int | None = -1) -> bytes:
        return self.read()


def test_a_piece_of_any_size_is_handed_on_without_copies_of_its_rest() -> None:
    piece = bytes(1 << 24)  # the expansion of a small block
    stream = inputs.bounded(_WholeAtOnce(piece), len(piece), lambda: None)
    tracemalloc.start()
    try:
        length = sum(len(part) for part in iter(lambda: stream.read(1 << 16), b""))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert length == len(piece)
    assert peak < len(piece) // 8
