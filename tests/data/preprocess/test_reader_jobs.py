"""Pieces of what a reader yields."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.data.preprocess.reader_jobs import Documents, measure, read_pieces
from megaegpt.data.readers import read_documents
from megaegpt.data.readers.documents import Problems
from megaegpt.errors import DataError
from tests.data.readers.test_wikipedia import dump, page


def fill(folder: Path, *files: str) -> list[int]:
    """Files 1.jsonl, 2.jsonl ...; returns their sizes."""
    for number, content in enumerate(files, 1):
        (folder / f"{number}.jsonl").write_text(content)
    return [len(content) for content in files]


def test_pieces_hold_all_texts_in_order_and_tell_what_is_finished(tmp_path: Path) -> None:
    first, second = fill(tmp_path, '{"text": "aaaa"}\n{"text": "bbbb"}\n', '{"text": "cc"}\n')
    where = [f"{tmp_path}/1.jsonl, line 1", f"{tmp_path}/1.jsonl, line 2"]
    assert list(read_pieces(str(tmp_path), "jsonl", {}, characters=4)) == [
        (first // 2, Documents(("aaaa",), (where[0],))),
        (first, Documents(("bbbb",), (where[1],))),
        (first + second, Documents(("cc",), (f"{tmp_path}/2.jsonl, line 1",))),
    ]
    assert measure(str(tmp_path), "jsonl")[0] == first + second


def test_problems_keep_their_place_among_the_documents(tmp_path: Path) -> None:
    fill(tmp_path, '{"text": "a"}\n{"text": "b"}\n{oops}\n{"text": "c"}\n[]\n')
    pieces = [piece for _, piece in read_pieces(str(tmp_path), "jsonl", {}, characters=1_000)]
    assert [piece.texts for piece in pieces] == [("a", "b"), ("c",)]
    found = [place.removeprefix(f"{tmp_path}/") for piece in pieces for place, _ in piece.problems]
    assert found == ["1.jsonl, line 3", "1.jsonl, line 5"]


def test_a_file_that_is_read_by_other_means_is_finished_row_by_row(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from tests.data.readers import test_parquet

    rows: list[str | None] = ["aaaa", None, "bbbb", "cc"]
    path = test_parquet.write(tmp_path / "a.parquet", rows, group=4)
    size = measure(str(path), "parquet")[0]
    pieces = list(read_pieces(str(path), "parquet", {}, characters=4))
    assert [(end, piece.texts) for end, piece in pieces] == [
        (size // 4, ("aaaa",)),
        (size * 3 // 4, ("bbbb",)),
        (size, ("cc",)),
    ]
    assert pieces[0][1].problems == ((f"{path}, row 2", "column 'text' is empty"),)


def test_options_reach_the_reader_and_its_refusals_come_through(tmp_path: Path) -> None:
    fill(tmp_path, '{"body": "a"}\n')
    [(_, piece)] = read_pieces(str(tmp_path), "jsonl", {"text_column": "body"}, characters=9)
    assert piece.texts == ("a",)
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_pieces(str(tmp_path / "absent"), "jsonl", {}, characters=9))


def test_wikitext_is_cleaned_where_the_piece_is_finished(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    path = tmp_path / "a.xml"
    path.write_text(dump(page("A", "a '''[[b|clock]]'''", 1), page("B", "{{only a template}}", 2)))
    [(_, piece)] = read_pieces(str(path), "wikipedia", {}, characters=999)
    assert piece.texts == ("a '''[[b|clock]]'''", "{{only a template}}")
    assert piece.finish() == ([(f"{path}, page 1", "a clock")], [])
    assert [d.text for d in read_documents("wikipedia", [path], Problems())] == ["a clock"]
    [(_, kept)] = read_pieces(str(path), "wikipedia", {"keep_wikitext": True}, characters=999)
    assert [text for _, text in kept.finish()[0]] == list(piece.texts)
