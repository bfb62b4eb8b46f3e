"""Wikipedia: the ``pages-articles`` XML dump, or what wikiextractor made of it.

The dump is read by expat's callbacks, so memory is that of one page. Tags are matched by their
local names, because the namespace changes with the version of the export format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO
from xml.parsers import expat

from megaegpt.data.readers import wikiextractor
from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import (
    MAX_DOCUMENT_BYTES,
    expand,
    open_bytes,
    reporting_damage,
)
from megaegpt.data.readers.wikitext import clean
from megaegpt.errors import DataError

SUFFIXES = None  # wikiextractor names its files wiki_00
_CHUNK = 1 << 18
_REDIRECT = re.compile(r"\s*#redirect\b", re.I)
_DISAMBIGUATION = re.compile(r"\{\{\s*(?:[\w -]*\b)?(?:disambig|hndis|geodis)", re.I)

# Where a page's facts stand: revision and contributor have ids of their own.
_FIELDS = {
    ("page", "title"): "title",
    ("page", "ns"): "namespace",
    ("page", "id"): "id",
    ("page", "revision", "model"): "model",
    ("page", "revision", "text"): "text",
}


def read(
    paths: Iterable[Path],
    problems: Problems,
    *,
    keep_wikitext: bool = False,
    drop_disambiguation: bool = False,
) -> Iterator[Document]:
    """One document an article: namespace 0, no redirects, wikitext turned into plain text.

    Args:
        paths: dumps (``.xml``, ``.xml.bz2``), wikiextractor's JSON or ``<doc>`` files, or folders.
        keep_wikitext: leave the markup of a dump as it is.
        drop_disambiguation: leave out pages that only list the meanings of a word.

    Raises:
        DataError: the XML declares a document type or entities of its own, which no dump does; or
            mwparserfromhell, which cleans the markup, is not installed.
    """
    documents = read_marked(paths, problems, drop_disambiguation=drop_disambiguation)
    for document, is_wikitext in documents:
        if keep_wikitext or not is_wikitext:
            yield document
        elif text := clean_or_report(document.text, document.where, problems):
            yield replace(document, text=text)


def read_marked(
    paths: Iterable[Path], problems: Problems, *, drop_disambiguation: bool = False
) -> Iterator[tuple[Document, bool]]:
    """Articles as they lie in the files, and whether their text is wikitext, still to be cleaned.

    Cleaning takes many times longer than reading; so it can be left to other processes.
    """
    for path in expand(paths, SUFFIXES, problems.left_out):
        if wikiextractor.is_output(path):
            for document in wikiextractor.read_file(path, problems):
                yield document, False
            continue
        for page in read_pages(path, problems):
            is_dropped = drop_disambiguation and _DISAMBIGUATION.search(page["text"])
            if _is_article(page) and not is_dropped:
                metadata = {"id": page["id"], "title": page["title"]}
                yield Document(page["text"], str(path), f"page {page['id']}", metadata), True


def clean_or_report(wikitext: str, where: str, problems: Problems) -> str:
    """The prose of an article; empty if there is none, or after a problem."""
    try:
        return clean(wikitext)
    except ValueError as error:
        problems.report(where, f"wikitext cannot be parsed ({error})")
        return ""


def _is_article(page: dict[str, str]) -> bool:
    return (
        page["namespace"] == "0"
        and "redirect" not in page
        and page.get("model", "wikitext") == "wikitext"
        and bool(page["text"])
        and not _REDIRECT.match(page["text"])
    )


def read_pages(path: Path, problems: Problems) -> Iterator[dict[str, str]]:
    """Title, namespace, id, text and, where given, model and redirect of each page of a dump."""
    with open_bytes(path) as file, reporting_damage(str(path), problems):
        try:
            yield from _parse(file, path)
        except expat.ExpatError as error:
            problems.report(str(path), f"truncated or damaged XML ({error})")


def _parse(file: IO[bytes], path: Path) -> Iterator[dict[str, str]]:
    finished: list[dict[str, str]] = []
    parser = _parser(finished.append, path)
    is_open = True
    while is_open:
        # What lies before a damaged place must come out: ``read`` would lose it with the error.
        chunk = file.read1(_CHUNK)  # type: ignore[attr-defined]
        is_open = bool(chunk)
        try:
            parser.Parse(chunk, not is_open)
        except expat.ExpatError:
            yield from finished
            raise
        yield from finished
        finished.clear()


def _parser(finish: Callable[[dict[str, str]], None], path: Path) -> expat.XMLParserType:
    """An expat parser that hands over each page when its end tag is met."""
    open_tags: list[str] = []  # from <page> downwards
    page: dict[str, str] = {}
    pieces: list[str] = []
    size = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal size
        tag = name.rpartition(" ")[2]
        if tag == "page" or open_tags:
            open_tags.append(tag)
        if tag == "redirect" and open_tags == ["page", "redirect"]:
            page["redirect"] = attributes.get("title", "")
        pieces.clear()
        size = 0

    def characters(data: str) -> None:
        nonlocal size
        if not open_tags:
            return
        size += len(data)
        if size > MAX_DOCUMENT_BYTES:
            raise DataError(f"{path}: page {page.get('title')!r} is too large to be one")
        pieces.append(data)

    def end(_: str) -> None:
        if not open_tags:
            return
        field = _FIELDS.get(tuple(open_tags))
        if field:
            page[field] = "".join(pieces)
        pieces.clear()
        if open_tags == ["page"]:
            finish({"title": "", "namespace": "0", "id": "", "text": "", **page})
            page.clear()
        open_tags.pop()

    parser = _parser_without_entities(path)
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    return parser


def _parser_without_entities(path: Path) -> expat.XMLParserType:
    """An expat parser that refuses entities: a few lines of them can expand without end."""

    def refuse(*_: object) -> None:
        raise DataError(f"{path}: declares a document type or entities; no Wikipedia dump does")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    return parser
