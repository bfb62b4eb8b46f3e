"""Project Gutenberg files: wrapper, wraps, quotes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.data.readers import gutenberg
from megaegpt.data.readers.documents import Document, Problems
from megaegpt.errors import DataError

HEADER = """The Project Gutenberg eBook of The Clock, by Ada Example

Title: The Clock

Author: Ada Example

Language: English

*** START OF THE PROJECT GUTENBERG EBOOK THE CLOCK ***
"""
BODY = """

THE CLOCK

It was late when the clock in the
hall struck, and “nobody” was
there to hear it.

She sang:

   High is the tower,
     low is the sun,

and went away.
"""
FOOTER = """
*** END OF THE PROJECT GUTENBERG EBOOK THE CLOCK ***

Updated editions will replace the previous one.
"""


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def read(path: Path, policy: str = "fail", **options: bool) -> list[Document]:
    return list(gutenberg.read([path], Problems(policy), **options))  # type: ignore[arg-type]


def test_wrapper_is_cut_and_paragraphs_are_joined_but_verse_is_not(tmp_path: Path) -> None:
    [document] = read(write(tmp_path / "clock.txt", HEADER + BODY + FOOTER))
    assert document.text == (
        "THE CLOCK\n\nIt was late when the clock in the hall struck, and “nobody” was there to hear"
        " it.\n\nShe sang:\n\n   High is the tower,\n     low is the sun,\n\nand went away."
    )
    assert document.metadata == {
        "title": "The Clock",
        "author": "Ada Example",
        "language": "English",
    }


def test_wraps_can_be_kept_and_quotes_straightened(tmp_path: Path) -> None:
    path = write(tmp_path / "clock.txt", HEADER + BODY + FOOTER)
    [document] = read(path, keep_wraps=True, straight_quotes=True)
    assert 'the clock in the\nhall struck, and "nobody" was\nthere' in document.text


@pytest.mark.parametrize("newline", ["\r\n", "\r\r\n", "\r"])
def test_byte_order_mark_and_foreign_line_ends_do_not_change_the_text(
    tmp_path: Path, newline: str
) -> None:
    text = HEADER + BODY + FOOTER
    [plain] = read(write(tmp_path / "plain.txt", text))
    foreign = write(tmp_path / "foreign.txt", text.replace("\n", newline), "utf-8-sig")
    [document] = read(foreign)
    assert document.text == plain.text


def test_older_markers_credits_and_closing_line_are_cut(tmp_path: Path) -> None:
    old = (
        "*** START OF THIS PROJECT GUTENBERG EBOOK A VERY LONG TITLE\nTHAT RUNS ON ***\n\n"
        "Produced by Some Volunteer\nand Another\n\n" + BODY + "\n\nEnd of the Project Gutenberg "
        "EBook of The Clock, by Ada\nExample\n\n*** END OF THIS PROJECT GUTENBERG EBOOK ***\n"
    )
    [document] = read(write(tmp_path / "old.txt", old))
    assert document.text.startswith("THE CLOCK")
    assert document.text.endswith("and went away.")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (BODY, "no '*** START OF"),
        (HEADER + BODY, "cut short"),
        (HEADER + "\n\n" + FOOTER, "is empty"),
    ],
)
def test_a_file_that_is_no_whole_book_is_named_or_counted(
    tmp_path: Path, text: str, what: str
) -> None:
    path = write(tmp_path / "bad.txt", text)
    with pytest.raises(DataError, match=r"bad\.txt") as raised:
        read(path)
    assert what in str(raised.value)
    problems = Problems("skip")
    assert list(gutenberg.read([path], problems)) == []
    assert problems.count == 1


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 at byte 0"):
        read(write(tmp_path / "latin.txt", "é" + HEADER + BODY + FOOTER, "cp1252"))


def test_a_folder_gives_its_books_in_numeric_order(tmp_path: Path) -> None:
    for number in (10, 2):
        body = BODY.replace("late", f"{number} o'clock")
        write(tmp_path / f"{number}.txt", HEADER + body + FOOTER)
    write(tmp_path / "notes.md", "not a book")
    assert [Path(document.source).name for document in read(tmp_path)] == ["2.txt", "10.txt"]
