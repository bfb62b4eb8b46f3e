"""Output of wikiextractor: ``AA/wiki_00`` with a JSON object a line, or ``<doc>`` blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import DECOMPRESSION_ERRORS, open_bytes, read_lines
from megaegpt.data.readers.json_lines import parse_object

# Not XML: the title's quotation marks and the text's & and < are left as they are.
_OPENING = re.compile(r'<doc id="([^"]*)".*? title="(.*)">$')


def is_output(path: Path) -> bool:
    """Whether a file begins as wikiextractor's do, whatever its name."""
    try:
        with open_bytes(path) as file:
            return file.read(64).lstrip().startswith((b"{", b"<doc "))
    except DECOMPRESSION_ERRORS:
        return False  # damaged; whoever reads it next says so


def read_file(path: Path, problems: Problems) -> Iterator[Document]:
    """One document an article; those without text, which are redirects, are left out."""
    lines = read_lines(path, problems)
    for number, line in lines:
        if not line.strip():
            continue
        where = f"line {number}"
        if line.startswith(b"<doc "):
            document = _block(line, where, lines, path, problems)
        else:
            document = _object(line, where, path, problems)
        if document is not None and document.text:
            yield document


def _object(line: bytes, where: str, path: Path, problems: Problems) -> Document | None:
    row = parse_object(line, f"{path}, {where}", problems)
    if row is None:
        return None
    title, text = row.get("title", ""), row.get("text")
    if not isinstance(text, str) or not isinstance(title, str):
        problems.report(f"{path}, {where}", "no text or title in this object")
        return None
    return Document(
        _without_title(text, title), str(path), where, {"id": row.get("id"), "title": title}
    )


def _block(
    line: bytes,
    where: str,
    lines: Iterator[tuple[int, bytes]],
    path: Path,
    problems: Problems,
) -> Document | None:
    """Read on to ``</doc>``."""
    body = []
    for _, more in lines:
        if more.rstrip() == b"</doc>":
            break
        body.append(more)
    else:
        problems.report(f"{path}, {where}", "truncated: this <doc> has no </doc>")
        return None
    try:
        opening = _OPENING.match(line.decode("utf-8").rstrip())
        text = b"".join(body).decode("utf-8")
    except UnicodeDecodeError as error:
        problems.report(f"{path}, {where}", f"not UTF-8 ({error.reason})")
        return None
    if not opening:
        problems.report(f"{path}, {where}", "a <doc> without id and title")
        return None
    id_, title = opening.groups()
    return Document(_without_title(text, title), str(path), where, {"id": id_, "title": title})


def _without_title(text: str, title: str) -> str:
    """Older versions, and the ``<doc>`` form, repeat the title as the first line."""
    first, _, rest = text.strip().partition("\n")
    return rest.strip() if first == title else text.strip()
