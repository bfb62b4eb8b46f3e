"""CNN articles: invented rows in the shape of the set's CSV files."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import pytest

from megaegpt.data.readers import inputs, tables
from megaegpt.data.readers.cnn import clean
from megaegpt.errors import DataError
from tests.data.readers.reading import read, read_skipping, texts

HEADER = [
    *("Index", "Author", "Date published", "Category", "Section", "Url"),
    *("Headline", "Description", "Keywords", "Second headline", "Article text"),
]


def row(index: int, text: str, date: str = "2021-07-15 02:46:59") -> list[str]:
    headline = 'A lorry, and "nobody" in it'
    return [
        *(str(index), "Ada Example, CNN", date, "news", "world"),
        *(
            f"https://example.com/{index}",
            f"{headline} - CNN",
            "One sentence.",
            f"world, {headline}",
        ),
        *(headline, text),
    ]


def table(*rows: list[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([HEADER, *rows])
    return out.getvalue().encode()


def test_articles_with_metadata_and_those_without_text_left_out(tmp_path: Path) -> None:
    path = tmp_path / "CNN_Articels_clean.csv"
    path.write_bytes(
        table(row(0, " (CNN)Right now, “x”."), row(1, "", date=""), row(2, "Two\nlines", date=""))
    )
    first, second = read("cnn", path)
    assert (first.text, first.position) == ("Right now, “x”.", "row 1")
    assert first.metadata == {
        "title": 'A lorry, and "nobody" in it',
        "author": "Ada Example, CNN",
        "date": "2021-07-15 02:46:59",
        "category": "news",
        "section": "world",
        "url": "https://example.com/0",
    }
    assert (second.text, second.position) == ("Two\nlines", "row 3")
    assert "date" not in second.metadata


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (" (CNN)There is one.Founded in 2015, it", "There is one.\nFounded in 2015, it"),
        ("(CNN Business)They left!Nobody knew why", "They left!\nNobody knew why"),
        ("in 2015.The firm", "in 2015.\nThe firm"),
        ("he said.”She left", "he said.”\nShe left"),
        ("it ended.“We won, he said", "it ended.\n“We won, he said"),
        ("Mr.Smith and Dr.Jones of Acme Inc.Holdings met", None),
        ("the U.S.Army at 5 p.m.Eastern time, J.R.R.Tolkien said", None),
        ("see www.CNN.com or a.b@Example.Com now", None),
        ("A normal end. Another sentence, e.g. This", None),
    ],
)
def test_joined_paragraphs_are_parted_but_abbreviations_are_not(
    raw: str, cleaned: str | None
) -> None:
    assert clean(raw) == (raw if cleaned is None else cleaned)


def test_the_text_can_be_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(table(row(0, " (CNN)One.Two three")))
    assert texts(read("cnn", path, keep_raw=True)) == [" (CNN)One.Two three"]


def test_both_members_of_the_zip_are_read(tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, text in (("CNN_Articels_clean", "one"), ("CNN_Articels_clean_2", "two")):
            archive.writestr(f"{folder}/CNN_Articels_clean.csv", table(row(0, text)))
        archive.writestr("../../evil.txt", "x")
    documents = read("cnn", path)
    assert texts(documents) == ["one", "two"]
    assert documents[1].source == f"{path}:CNN_Articels_clean_2/CNN_Articels_clean.csv"
    assert [p.name for p in tmp_path.iterdir()] == ["archive.zip"]


def test_a_zip_bomb_and_a_cut_zip_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "EXPANSION_FREE_BYTES", 1 << 20)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", table(*[row(0, "a" * 100_000)] * 100))
    with pytest.raises(DataError, match=r"bomb.*expands more than 100-fold"):
        read("cnn", bomb)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(bomb.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.zip: truncated, damaged or encrypted zip"):
        read("cnn", cut)


def test_a_zip_that_git_lfs_has_not_fetched_is_told(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
    (tmp_path / "a.zip").write_bytes(pointer)
    with pytest.raises(DataError, match=r"a\.zip: a Git LFS pointer"):
        read("cnn", tmp_path)


def test_a_field_beyond_the_csv_modules_default_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(table(row(0, "long " * 50_000)))
    assert len(texts(read("cnn", path))[0]) == 249_999


def test_a_field_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_FIELD_CHARACTERS", 10_000)
    path = tmp_path / "a.csv"
    unclosed = table(row(0, "good")) + b'1,"never closed' + b",x\n" * 10_000
    path.write_bytes(unclosed)
    with pytest.raises(DataError, match=r"a\.csv, row 2 .*field limit"):
        read("cnn", path)
    documents, problems = read_skipping("cnn", path)
    assert (texts(documents), problems.count) == (["good"], 1)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b"1,too,few\r\n", "3 fields where the header has 11"),
        (b",".join([b"x"] * 10 + [b"caf\xe9"]) + b"\r\n", "not UTF-8"),
        (b'"quoted"junk,' + b",".join([b"x"] * 10) + b"\r\n", "not CSV"),
        (b'1,"the file ends in here', "not CSV"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, bad: bytes, what: str) -> None:
    path = tmp_path / "a.csv"
    last = b"" if bad.endswith(b"here") else table(row(2, "last")).split(b"\r\n", 1)[1]
    path.write_bytes(table(row(0, "two\nlines")) + bad + last)
    with pytest.raises(DataError, match=r"a\.csv, row 2 \(line 4\)") as raised:
        read("cnn", path)
    assert what in str(raised.value)
    documents, problems = read_skipping("cnn", path)
    assert texts(documents) == (["two\nlines", "last"] if last else ["two\nlines"])
    assert problems.count == 1


def test_another_table_is_refused_with_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Text,Label\na,b\n")
    with pytest.raises(DataError, match="no column 'article text'; the columns are text, label"):
        read("cnn", path)


def test_capitals_in_names_change_nothing_and_other_members_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ARCHIVE.ZIP"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("A.CSV", table(row(1, "Text.")))
        archive.writestr("notes.txt", "more")
        archive.writestr("__MACOSX/._A.CSV", b"\x00\x05\x16\x07")
    documents, problems = read_skipping("cnn", tmp_path)
    assert len(documents) == 1
    assert problems.left_out.lines() == [
        f"1 not read, members that are no .csv: {path}:notes.txt",
        f"1 not read, hidden: {path}:__MACOSX/._A.CSV",
    ]
