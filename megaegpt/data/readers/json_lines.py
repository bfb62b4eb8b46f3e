"""JSON Lines: one object a line, the text under a configurable key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import BYTE_ORDER_MARK, expand, read_lines

SUFFIXES = tuple(
    kind + compression
    for kind in (".jsonl", ".json", ".ndjson")
    for compression in ("", ".gz", ".bz2", ".xz", ".zst")
)
IDENTITY_COLUMNS = ("id", "url", "title", "language")
"""Columns that say which document it is: kept as metadata where they exist."""

_OPENED = {b"[": "array", b"{": "object"}


def read(
    paths: Iterable[Path], problems: Problems, *, text_column: str = "text"
) -> Iterator[Document]:
    """One document a line; folders are searched, numbered chunks in numeric order.

    A line that is no JSON object, lacks the text or has an empty one is reported, and so is a last
    line that was cut off, as files split at a byte limit have it.

    Args:
        text_column: the key of the text.
    """
    for path in expand(paths, SUFFIXES, problems.left_out):
        for number, line in read_lines(path, problems):
            if not line.strip():
                continue
            position = f"line {number}"
            row = parse_object(line, f"{path}, {position}", problems)
            if row is None:
                continue
            text = text_of(row, text_column, f"{path}, {position}", problems)
            if text is not None:
                yield Document(text, str(path), position, metadata_of(row))


def parse_object(line: bytes, where: str, problems: Problems) -> dict[str, Any] | None:
    """The object on a line, or None after reporting what is wrong with it."""
    try:
        # Of bytes json would guess the encoding, line by line.
        text = line.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "surrogatepass")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        problems.report(where, f"not UTF-8 at byte {error.start:,} of the line")
        return None
    except (ValueError, RecursionError) as error:
        if (kind := _OPENED.get(line.strip())) is not None:
            problems.report(where, f"a JSON {kind} over several lines: write one object a line")
            return None
        cut = "" if line.endswith(b"\n") else "the file ends within this line: "
        problems.report(where, f"{cut}not JSON ({error})")
        return None
    if not isinstance(row, dict):
        problems.report(where, f"a JSON {type(row).__name__}, not an object")
        return None
    return row


def text_of(row: Mapping[str, Any], column: str, where: str, problems: Problems) -> str | None:
    """The text of a row, or None after reporting that there is none."""
    text = row.get(column)
    if isinstance(text, str) and text.strip():
        return text
    if column not in row:
        names = ", ".join(map(repr, row)) or "none"
        problems.report(where, f"no text column {column!r}; the columns are {names}")
    elif text is None or isinstance(text, str):
        problems.report(where, f"column {column!r} is empty")
    else:
        problems.report(where, f"column {column!r} is of type {type(text).__name__}, not a string")
    return None


def metadata_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The object under ``meta``, and the columns that say which document it is."""
    meta = row.get("meta")
    known = {name: row[name] for name in IDENTITY_COLUMNS if row.get(name) is not None}
    return {**meta, **known} if isinstance(meta, dict) else known
