"""Enron e-mail: the maildir tree, its tar.gz, or Kaggle's ``emails.csv``.

Every message is read once: the same mail lies in several folders under different Message-IDs, so
duplicates are known by their text. Headers are taken apart by hand, since their addresses follow no
standard and folded lines may break inside a word.
"""

from __future__ import annotations

import hashlib
import quopri
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megaegpt.data.readers.archives import is_tar_name, read_members, read_small
from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import (
    MAX_DOCUMENT_BYTES,
    expand,
    normalize_newlines,
    open_bytes,
    read_whole,
    reporting_damage,
)
from megaegpt.data.readers.tables import read_rows
from megaegpt.errors import DataError

SUFFIXES = None  # messages are named by numbers
_NOT_MAIL = frozenset({"contacts", "calendar", "tasks"})
_NOT_MAIL_REASON = "contacts, calendars and tasks"
_END_OF_HEADERS = re.compile(rb"\r?\n\r?\n")
_HEADER = re.compile(r"[!-9;-~]+:")
_METADATA = {"subject": "subject", "from": "from", "date": "date"}

# From the first of these lines on, a mail repeats what it answers or forwards.
_HISTORY = re.compile(
    r"^ *-{3,} ?Original (?:Message|Appointment) ?-{3,}"
    r"|^ *-{6,} Forwarded by .* on .*"
    r"|^[^\n]{1,80}@[A-Z_]+\n(?:[^\n]*\n){0,2}?To: "
    r"|^ *(?:On .{1,100} wrote|.{1,80} writes):$",
    re.M,
)
_QUOTED_LINE = re.compile(r"^ *>.*\n?", re.M)


def read(
    paths: Iterable[Path],
    problems: Problems,
    *,
    keep_quoted: bool = False,
    keep_duplicates: bool = False,
) -> Iterator[Document]:
    """One document a message body; empty ones, contacts, calendars and tasks are left out.

    Args:
        paths: the folder ``maildir`` (or below), ``enron_mail_*.tar.gz``, or ``emails.csv``.
        keep_quoted: keep the history that replies and forwards repeat.
        keep_duplicates: keep every copy of a message.
    """
    seen: set[bytes] = set()
    for source, name, raw in _messages(paths, problems):
        where = f"{source}, {name}" if name else source
        try:
            headers, text = parse(raw)
        except ValueError as error:
            problems.report(where, str(error))
            continue
        if not keep_quoted:
            text = strip_history(text)
        text = text.strip()
        if not text:
            continue
        if not keep_duplicates:
            digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
            if digest in seen:
                continue
            seen.add(digest)
        metadata = {new: headers[old] for old, new in _METADATA.items() if headers.get(old)}
        yield Document(text, source, name, metadata)


def parse(raw: bytes) -> tuple[dict[str, str], str]:
    """The headers, by lower-case name and with folded lines joined, and the body of a message.

    Raises:
        ValueError: these bytes are no message.
    """
    end = _END_OF_HEADERS.search(raw)
    head, body = (raw[: end.start()], raw[end.end() :]) if end else (raw.rstrip(b"\r\n"), b"")
    headers = _headers(normalize_newlines(_decode(head)))
    if headers.get("content-transfer-encoding", "").lower() == "quoted-printable":
        body = quopri.decodestring(body)
    return headers, normalize_newlines(_decode(body))


def _headers(head: str) -> dict[str, str]:
    """Unfold and split. A tab was put in wherever a line got long, even inside a word."""
    lines = head.replace("\n\t", "").replace("\n ", " ").split("\n")
    headers: dict[str, str] = {}
    for line in lines:
        if not _HEADER.match(line):
            raise ValueError("not a mail message: no headers followed by an empty line")
        name, _, value = line.partition(":")
        headers.setdefault(name.lower(), value.strip())
    return headers


def _decode(raw: bytes) -> str:
    """Mail is announced as ASCII, but some is UTF-8 and some Windows-1252."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def strip_history(text: str) -> str:
    """Cut a mail down to its sender's words: no forwarded or answered mail, no quoted lines."""
    history = _HISTORY.search(text)
    return _QUOTED_LINE.sub("", text[: history.start()] if history else text)


def _messages(paths: Iterable[Path], problems: Problems) -> Iterator[tuple[str, str, bytes]]:
    """File, place in it and bytes of every message that may be mail."""
    for path in expand(paths, SUFFIXES, problems.left_out):
        if path.name.lower().endswith((".csv", ".csv.gz")):
            yield from _from_csv(path, problems)
        elif is_tar_name(path):
            yield from _from_tar(path, problems)
        elif not _is_mail(path.parts[:-1]):
            problems.left_out.add(str(path), _NOT_MAIL_REASON)
        else:
            try:
                with path.open("rb") as file:
                    message = read_whole(file, str(path), MAX_DOCUMENT_BYTES)
            except (DataError, OSError) as error:
                problems.report(str(path), str(error).removeprefix(f"{path}: "))
            else:
                yield str(path), "", message


def _from_csv(path: Path, problems: Problems) -> Iterator[tuple[str, str, bytes]]:
    with open_bytes(path) as file, reporting_damage(str(path), problems):
        for position, row in read_rows(file, str(path), ("file", "message"), problems):
            place = f"{position} ({row['file']})"
            if _is_mail(tuple(row["file"].split("/")[:-1])):
                yield str(path), place, row["message"].encode()
            else:
                problems.left_out.add(f"{path}, {place}", _NOT_MAIL_REASON)


def _from_tar(path: Path, problems: Problems) -> Iterator[tuple[str, str, bytes]]:
    with open_bytes(path) as file:
        for name, size, content in read_members(file, str(path), problems):
            *folders, last = name.split("/")
            is_hidden = last.startswith(".")
            if is_hidden or not _is_mail(tuple(folders)):
                problems.left_out.add(f"{path}:{name}", "hidden" if is_hidden else _NOT_MAIL_REASON)
                continue
            raw = read_small(name, size, content, str(path), problems)
            if raw is not None:
                yield str(path), name, raw


def _is_mail(folders: tuple[str, ...]) -> bool:
    return not folders or folders[-1] not in _NOT_MAIL
