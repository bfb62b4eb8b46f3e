"""The input of preprocessing, cut into jobs: the same jobs and shards however many workers run
them.

All files count as one row of bytes, as they lie on disk. A job is about a megabyte of it; the shard
that a job's documents go to follows from the job's place in that row.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megaegpt.data.preprocess.reader_jobs import Documents, measure, read_pieces
from megaegpt.data.readers import Option, json_lines, plain
from megaegpt.data.readers.documents import LeftOut
from megaegpt.data.readers.inputs import (
    DECOMPRESSION_ERRORS,
    MAX_DOCUMENT_BYTES,
    decompressed,
    ends_in,
    expand,
    natural_key,
)
from megaegpt.errors import DataError
from megaegpt.files import LFS_POINTER_MESSAGE, is_lfs_pointer

JOB_BYTES = 1 << 20
_SMALLEST_JOB = 1 << 14
STDIN = "-"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_LARGEST_POINTER = 1024  # bytes; Git LFS keeps its own below this

_SUFFIXES = {
    "jsonl": json_lines.SUFFIXES,
    "text": plain.SUFFIXES,
    None: json_lines.SUFFIXES + plain.SUFFIXES,
}
"""Of the files below a folder, by their kind."""

Kind = str
"""``jsonl`` and ``text``, which workers read themselves, or another of the readers' names."""


@dataclass(frozen=True)
class InputFile:
    """A file to read, as it was when the run was planned."""

    path: str
    kind: Kind
    size: int
    mtime_ns: int
    reader_options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class LineSpan:
    """Whole lines of an uncompressed file, which the worker reads itself."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class Lines:
    """Whole lines of a stream that only one process can read."""

    path: str
    content: bytes
    first_line: int


@dataclass(frozen=True)
class Texts:
    """Files that are one document each."""

    paths: tuple[str, ...]


@dataclass(frozen=True)
class Damage:
    """A place where a compressed file cannot be read on; takes its turn among the jobs."""

    where: str
    what: str


Content = LineSpan | Lines | Texts | Documents | Damage


@dataclass(frozen=True)
class Job:
    """Documents to tokenise, and where they go."""

    shard: int
    end: int
    """Bytes of input up to and including this job."""
    content: Content

    @property
    def where(self) -> str:
        """The place in the input, for messages."""
        content = self.content
        if isinstance(content, LineSpan):
            return f"{content.path}, bytes {content.start:,} to {content.end:,}"
        if isinstance(content, Lines):
            return f"{content.path}, from line {content.first_line:,} on"
        if isinstance(content, Documents):
            return content.places[0] if content.places else content.problems[0][0]
        return content.paths[0] if isinstance(content, Texts) else content.where


class LineCounter:
    """Lines before a byte of a file, counted only where a message needs them."""

    def __init__(self) -> None:
        self._path = ""
        self._offset = self._lines = 0

    def before(self, path: str, offset: int) -> int:
        """Line ends in the first ``offset`` bytes of ``path``; cheap for rising offsets."""
        if path != self._path or offset < self._offset:
            self._path, self._offset, self._lines = path, 0, 0
        with open(path, "rb") as file:
            file.seek(self._offset)
            while self._offset < offset:
                block = file.read(min(JOB_BYTES, offset - self._offset))
                if not block:
                    break
                self._lines += block.count(b"\n")
                self._offset += len(block)
        return self._lines


def find_inputs(
    paths: Iterable[str],
    kind: Kind | None = None,
    reader_options: Mapping[str, Option] | None = None,
    left_out: LeftOut | None = None,
) -> list[InputFile]:
    """Files that ``paths`` (files, folders, globs, ``-`` for standard input) stand for, in order.

    Args:
        kind: what all of them are; None: by their names (``-`` is JSON Lines). Below folders, JSON
            Lines and text are the files that are named so.
        reader_options: for a kind that neither is JSON Lines nor text.
        left_out: told of the files below folders that are no input.

    Raises:
        DataError: nothing is there, or a name does not say what the file is.
    """
    left_out = left_out or LeftOut()
    if kind is None or kind in ("jsonl", "text"):
        return [
            _describe(path, kind)
            for pattern in paths
            for path in _matches(pattern, _SUFFIXES[kind], left_out)
        ]
    return [
        InputFile(path, kind, *measure(path, kind, left_out), reader_options or {})
        for pattern in paths
        for path in _glob(pattern)  # a folder whole: how it is searched is the reader's business
        if not left_out.written(Path(path))
    ]


def check_text_key(text_key: str, files: Sequence[InputFile]) -> None:
    """Refuse the name of a column where no input has columns.

    Raises:
        DataError: all of ``files`` are plain texts.
    """
    if all(file.kind == "text" for file in files):
        raise DataError(
            f"--text-key {text_key} is for JSON Lines and tables, and all inputs are text files: "
            "leave it out"
        )


def _matches(pattern: str, suffixes: tuple[str, ...], left_out: LeftOut) -> Iterator[str]:
    if pattern == STDIN:
        yield STDIN
        return
    for path in expand(map(Path, _glob(pattern)), suffixes, left_out):
        yield str(path)


def _glob(pattern: str) -> list[str]:
    """The files and folders that a name or pattern stands for, numbers in order of their value."""
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [pattern]
    names = sorted(glob.glob(pattern, recursive=True), key=natural_key)
    if not names:
        raise DataError(f"{pattern}: no file matches")
    # What lies below a folder that matches is read with it, and once.
    folders = {Path(name) for name in names if os.path.isdir(name)}
    return [name for name in names if folders.isdisjoint(Path(name).parents)]


def _describe(path: str, kind: Kind | None) -> InputFile:
    if path == STDIN:
        if kind == "text":
            raise DataError("standard input is read as JSON Lines, not as text")
        return InputFile(path, "jsonl", 0, 0)
    if kind is None:
        kind = _kind_by_name(path)
    try:
        state = Path(path).stat()
        is_pointer = state.st_size < _LARGEST_POINTER and is_lfs_pointer(Path(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if is_pointer:
        raise DataError(f"{path}: {LFS_POINTER_MESSAGE}")
    return InputFile(path, kind, state.st_size, state.st_mtime_ns)


def _kind_by_name(path: str) -> Kind:
    if ends_in(path, json_lines.SUFFIXES):
        return "jsonl"
    if ends_in(path, plain.SUFFIXES):
        return "text"
    if ends_in(path, (".parquet",)):
        raise DataError(f"{path} is read with --format parquet")
    raise DataError(f"{path}: its name does not say what it is; use --format jsonl or text")


def make_jobs(
    files: Sequence[InputFile], shards: int, left_out: LeftOut | None = None
) -> Iterator[Job]:
    """Cut files into jobs for ``shards`` shards of about equally many bytes on disk.

    Args:
        left_out: told of the members of archives that are no input.

    Raises:
        DataError: a file cannot be opened, or standard input is to fill several shards.
    """
    total = sum(file.size for file in files)
    if shards > 1 and any(file.path == STDIN for file in files):
        raise DataError("standard input has no known length, so it fills one shard: no --shards")
    size = max(_SMALLEST_JOB, min(JOB_BYTES, total // (16 * shards)))
    start = 0
    for end, content in _contents(files, size, left_out or LeftOut()):
        yield Job(min(start * shards // max(total, 1), shards - 1), end, content)
        start = end


def _contents(
    files: Sequence[InputFile], size: int, left_out: LeftOut
) -> Iterator[tuple[int, Content]]:
    """Contents of about ``size`` bytes, each with the bytes of all input up to its end."""
    before = 0
    texts: list[str] = []
    texts_bytes = 0
    for file in files:
        if texts and (file.kind != "text" or texts_bytes + file.size > size):
            yield before, Texts(tuple(texts))
            texts, texts_bytes = [], 0
        if file.kind == "text":
            texts.append(file.path)
            texts_bytes += file.size
        elif file.kind != "jsonl":
            pieces = read_pieces(file.path, file.kind, file.reader_options, size, left_out)
            for end, piece in pieces:
                yield before + end, piece
        else:
            for end, content in _line_jobs(file, size):
                yield before + end, content
        before += file.size
    if texts:
        yield before, Texts(tuple(texts))


def _line_jobs(file: InputFile, size: int) -> Iterator[tuple[int, Content]]:
    if file.path == STDIN:
        yield from _stream_jobs(file.path, sys.stdin.buffer, None, size)
        return
    try:
        raw = open(file.path, "rb")  # noqa: SIM115  (closed two lines below)
    except OSError as error:
        raise DataError(f"cannot read {file.path}: {error.strerror}") from None
    with raw:
        if ends_in(file.path, _COMPRESSED):
            stream = decompressed(raw, Path(file.path).suffix, file.size)
            yield from _stream_jobs(file.path, stream, raw, size)
        else:
            yield from _span_jobs(file, raw, size)


def _span_jobs(file: InputFile, raw: IO[bytes], size: int) -> Iterator[tuple[int, LineSpan]]:
    start = 0
    while start < file.size:
        end = min(start + size, file.size)
        if end < file.size:
            raw.seek(end)
            end += len(raw.readline(MAX_DOCUMENT_BYTES))
        if end - start > MAX_DOCUMENT_BYTES:
            raise DataError(f"{file.path}: a line near byte {start:,} is too long for a document")
        yield end, LineSpan(file.path, start, end)
        start = end


def _stream_jobs(
    path: str, stream: IO[bytes], raw: IO[bytes] | None, size: int
) -> Iterator[tuple[int, Lines | Damage]]:
    """Lines of a stream; ``raw`` tells how much of the file on disk they took."""
    line, pending, damage = 1, bytearray(), None
    while damage is None:
        try:
            block = stream.read1(1 << 18)  # type: ignore[attr-defined]
        except DECOMPRESSION_ERRORS as error:
            damage = f"truncated or damaged ({error})"
            del pending[pending.rfind(b"\n") + 1 :]
            block = b""
        pending += block
        if block and len(pending) < size:
            continue
        if len(pending) > MAX_DOCUMENT_BYTES:
            raise DataError(f"{path}: a line after line {line:,} is too long for a document")
        end = pending.rfind(b"\n") + 1 if block else len(pending)
        position = raw.tell() if raw else 0
        if end:
            content = bytes(pending[:end])
            yield position, Lines(path, content, line)
            line += content.count(b"\n")
            del pending[:end]
        if not block:
            break
    if damage is not None:
        yield raw.tell() if raw else 0, Damage(f"{path}, line {line}", damage)
