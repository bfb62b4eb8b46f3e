"""Project Gutenberg text files: the licence wrapper cut off, hard-wrapped lines joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import expand, read_text
from megaegpt.errors import DataError

SUFFIXES = (".txt",)

# A long title runs on over several lines, so the marker ends at its closing asterisks.
_START = re.compile(
    r"^\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]{0,400}\*\*\*", re.I | re.M
)
_END = re.compile(r"^\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK", re.I | re.M)
# Older files name the producer after the start marker and repeat the title before the end marker.
_PRODUCER = re.compile(r"\A\s*(?:Produced|E-?text prepared) by\b.*?\n\s*\n", re.I | re.S)
_CLOSING = re.compile(r"\n *End of (?:the )?Project Gutenberg.{0,300}\Z", re.I | re.S)
_HEADER = re.compile(r"^(Title|Author|Language|Translator)s?: *(\S.*)$", re.M)

# A line break before an indented line separates verses or entries of a list, and stays.
_WRAP = re.compile(r"(?<!\n)\n(?![\n ])")
_QUOTES = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e", '"') | dict.fromkeys("\u2018\u2019\u201a", "'")
)


def cut_wrapper(text: str, where: str) -> str:
    """The book between the ``*** START OF`` and ``*** END OF`` lines, without surrounding blanks.

    Args:
        text: a whole Project Gutenberg file.
        where: the file, for error messages.

    Raises:
        DataError: a marker is missing, so the text is cut short or of another origin.
    """
    start = _START.search(text)
    if not start:
        raise DataError(
            f"{where}: no '*** START OF THE PROJECT GUTENBERG EBOOK' line; is it a whole book?"
        )
    end = _END.search(text, start.end())
    if not end:
        raise DataError(
            f"{where}: no '*** END OF THE PROJECT GUTENBERG EBOOK' line; it is cut short"
        )
    body = text[start.end() : end.start()]
    body = _PRODUCER.sub("", body, count=1)
    return _CLOSING.sub("", body).strip()


def join_wrapped_lines(text: str) -> str:
    """Paragraphs on one line each; blank lines and the line breaks of indented verse stay."""
    return _WRAP.sub(" ", text)


def straighten_quotes(text: str) -> str:
    """Typographic quotation marks and apostrophes become the straight ASCII ones."""
    return text.translate(_QUOTES)


def read(
    paths: Iterable[Path],
    problems: Problems,
    *,
    keep_wraps: bool = False,
    straight_quotes: bool = False,
) -> Iterator[Document]:
    """One document a book; folders are searched for ``*.txt``.

    Args:
        keep_wraps: leave the hard line breaks (about 70 columns) as they are.
        straight_quotes: turn typographic quotation marks into straight ones.
    """
    for path in expand(paths, SUFFIXES, problems.left_out):
        try:
            raw = read_text(path)
            text = cut_wrapper(raw, str(path))
        except DataError as error:
            problems.report(str(path), str(error).removeprefix(f"{path}: "))
            continue
        if not text:
            problems.report(str(path), "the book between START and END is empty")
            continue
        if not keep_wraps:
            text = join_wrapped_lines(text)
        if straight_quotes:
            text = straighten_quotes(text)
        yield Document(text, str(path), "", _header(raw))


def _header(raw: str) -> dict[str, str]:
    """Title, author, language from the lines before the start marker, as far as they are there."""
    start = _START.search(raw)
    lines = raw[: start.start()] if start else ""
    return {name.lower(): value.strip() for name, value in _HEADER.findall(lines)}
