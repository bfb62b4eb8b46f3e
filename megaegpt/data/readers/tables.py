"""CSV as public datasets have it: huge fields, line breaks in fields, odd rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import IO

from megaegpt.data.readers.documents import Problems
from megaegpt.errors import DataError

MAX_FIELD_CHARACTERS = 1 << 26
"""Longest field of a row. Python's default, 131,072, is less than a long article or mail. Far
beyond this, a quotation mark is missing and the rest of the file is being taken for one field."""


def read_rows(
    file: IO[bytes], where: str, required: tuple[str, ...], problems: Problems
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The position and the fields of each row, by column names in lower case without outer blanks.

    Rows with too few or too many fields, broken quoting or bytes that are not UTF-8 are reported.

    Args:
        file: CSV in UTF-8, comma-separated, quoted after RFC 4180.
        where: its name.
        required: columns, in lower case, without which it is not the file it should be.

    Raises:
        DataError: a required column is missing.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    # Undecodable bytes become lone surrogates, so that the row they are in can be named.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, strict=True)
    header = _header(rows, where, required)
    number = 0
    while True:
        number += 1
        position = f"row {number}"
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problems.report(f"{where}, {position} (line {rows.line_num})", f"not CSV ({error})")
            if "field limit" in str(error):  # no telling where the next row starts
                return
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            what = f"{len(fields)} fields where the header has {len(header)}"
            problems.report(f"{where}, {position} (line {rows.line_num})", what)
        elif any(not _is_clean(field) for field in fields):
            problems.report(f"{where}, {position} (line {rows.line_num})", "not UTF-8")
        else:
            yield position, dict(zip(header, fields, strict=True))


def _header(rows: Iterator[list[str]], where: str, required: tuple[str, ...]) -> list[str]:
    try:
        header = [name.strip().lower() for name in next(rows, [])]
    except csv.Error as error:
        raise DataError(f"{where}: not CSV ({error})") from error
    missing = [name for name in required if name not in header]
    if missing:
        found = ", ".join(header)[:200] or "none"
        raise DataError(f"{where}: no column {missing[0]!r}; the columns are {found}")
    return header


def _is_clean(field: str) -> bool:
    try:
        field.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
