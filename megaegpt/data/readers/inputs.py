"""Functions of all readers: find files, order them, open them, and read them by lines."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from megaegpt.data.readers.documents import LeftOut, Problems
from megaegpt.errors import DataError
from megaegpt.files import LFS_POINTER, LFS_POINTER_MESSAGE, is_special

DECOMPRESSION_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)
"""Exceptions of Python's decompressors on truncated or damaged input."""

MAX_DOCUMENT_BYTES = 1 << 28
"""Longest line, member or field that is taken for a document; more is a sign of damage."""

MAX_TEXT_BYTES = 1 << 32
"""Longest file that is read whole: a text that is one document, or a JSON array of records."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Mark that some programs write before UTF-8 text."""

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte-order marks of UTF-16 text, as PowerShell writes it."""

UTF_16_MESSAGE = "text in UTF-16: convert it (iconv -f UTF-16 -t UTF-8)"

# Text compresses 3 to 10 times; a file that grows a hundredfold and is large is no text.
_MAX_EXPANSION = 100
EXPANSION_FREE_BYTES = 1 << 26
"""Decompressed bytes up to which a file may expand by any factor."""

SHARD_TOKENIZER = "tokenizer"
"""The folder of a tokenizer beside the shards that were made with it."""

_PIECE_BYTES = 1 << 20

_OF_SHARDS = "shards of tokens and their manifests"

# All that a piece stands for comes out at once. Four bytes can stand for 128 KiB, so these pieces
# cannot be more than 128 MiB.
_ZSTD_BLOCK = 1 << 12

# The most that there is, of `zstd --long=31`. A frame takes memory as it fills its window.
_ZSTD_WINDOW = 1 << 31

_Piece = tuple[int, int, str]


def expand(
    paths: Iterable[Path],
    suffixes: tuple[str, ...] | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[Path]:
    """Files, in the order given; folders become the files below them.

    Below a folder, hidden files are left out, only names ending in one of ``suffixes`` are taken
    (all names without it), and numbers sort by value: ``chunk2`` before ``chunk10``. One folder's
    names are held at a time, so trees of any number of files are walked in little memory.

    Args:
        paths: files and folders.
        suffixes: lower-case ends of names; the names may have capitals.
        left_out: told of every file and folder below a folder that is not taken, and why.

    Raises:
        DataError: a path does not exist or is no file, or a folder holds nothing to read.
    """
    left_out = left_out or LeftOut()
    for path in paths:
        if path.is_dir():
            found = False
            for file in _walk(path, suffixes, left_out):
                found = True
                yield file
            if not found:
                kinds = f" ending in {' or '.join(suffixes)}" if suffixes else ""
                seen = "".join(f"; {line}" for line in left_out.lines())
                raise DataError(f"{path}: no files{kinds} in this folder{seen}")
        elif is_special(path):
            raise DataError(
                f"{path} is a pipe or a device, not a file: give JSON Lines on standard input "
                "(-), or write it to a file first"
            )
        elif path.exists():
            if _is_of_shards(path) and not left_out.written(path):
                left_out.add(str(path), _OF_SHARDS)
            elif not left_out.written(path):
                yield path
        else:
            raise DataError(f"{path}: no such file or folder")


def _walk(folder: Path, suffixes: tuple[str, ...] | None, left_out: LeftOut) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error
    for entry in ordered:
        path = folder / entry.name
        if left_out.written(path):
            continue
        if _is_of_shards(path):
            left_out.add(str(path), _OF_SHARDS)
        elif why := _reason_to_leave_out(entry, suffixes):
            left_out.add(str(path), why)
        elif entry.is_dir():
            yield from _walk(path, suffixes, left_out)
        else:
            yield path


def _is_of_shards(path: Path) -> bool:
    """Whether preprocessing has made it: one of a pair .bin and .idx, or the manifest or the folder
    of the tokenizer beside it.
    """
    if path.name == "manifest.json" or is_tokenizer_of_shards(path):
        return any(path.parent.glob("*.idx"))
    other = {".bin": ".idx", ".idx": ".bin"}.get(path.suffix)
    return other is not None and path.with_suffix(other).exists()


def is_tokenizer_of_shards(path: Path) -> bool:
    """Whether it has the name of the folder in which shards' tokenizer lies, and is one."""
    return path.name == SHARD_TOKENIZER and path.is_dir()


def _reason_to_leave_out(entry: os.DirEntry[str], suffixes: tuple[str, ...] | None) -> str:
    """Why a file or folder below a folder is not read; empty: it is."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return ""
    if entry.is_dir():
        return "links to folders"
    if not entry.is_file():
        return "links to nothing" if entry.is_symlink() else "pipes or devices"
    return "" if suffixes is None or ends_in(entry.name, suffixes) else _other_kind(entry.name)


def _other_kind(name: str) -> str:
    if ends_in(name, (".parquet",)):
        return "parquet (--format parquet reads it)"
    return "names of no known kind of text"


def ends_in(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a name ends in one of ``suffixes``, which are in lower case; capitals count alike."""
    return name.lower().endswith(suffixes)


def is_hidden_member(name: str) -> bool:
    """Whether an archive's member is what file managers leave behind (``__MACOSX/._a.txt``)."""
    parts = (part for part in name.split("/") if part not in (".", ".."))
    return any(part.startswith((".", "__")) for part in parts)


def natural_key(name: str) -> list[_Piece]:
    """A sort key under which digits count as numbers, so part 2 comes before part 10."""
    pieces = re.split(r"([0-9]+)", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in pieces if p]


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading, undoing ``.gz``, ``.bz2``, ``.xz`` or ``.zst`` compression.

    Reading raises one of :data:`DECOMPRESSION_ERRORS` where the file is truncated or damaged, or
    grows beyond all reason.

    Raises:
        DataError: the file cannot be opened, or stands for one that Git LFS has not fetched.
    """
    try:
        file = path.open("rb")
        is_pointer = file.peek(len(LFS_POINTER)).startswith(LFS_POINTER)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if is_pointer:
        file.close()
        raise DataError(f"{path}: {LFS_POINTER_MESSAGE}")
    return decompressed(file, path.suffix, os.fstat(file.fileno()).st_size)


def decompressed(file: IO[bytes], suffix: str, size: int) -> IO[bytes]:
    """``file`` without the compression that ``suffix`` stands for.

    Args:
        size: bytes of the compressed file, against which its expansion is measured.
    """
    plain: IO[bytes]
    suffix = suffix.lower()
    if suffix in (".gz", ".tgz"):
        plain = cast(IO[bytes], gzip.GzipFile(fileobj=file))
    elif suffix == ".bz2":
        plain = cast(IO[bytes], bz2.BZ2File(file))
    elif suffix == ".xz":
        plain = cast(IO[bytes], lzma.LZMAFile(file))  # noqa: SIM115  (bounded() closes the file)
    elif suffix == ".zst":
        plain = cast(IO[bytes], ZstdStream(file))
    else:
        return file
    return bounded(plain, size, close=file.close)


def bounded(plain: IO[bytes], size: int, close: Callable[[], None]) -> IO[bytes]:
    """A decompressed stream that refuses to grow without end out of ``size`` bytes.

    A small file is read in small pieces too, so that the place in it tells how far it is read.
    """
    piece = min(max(size // 64, 1 << 13), 1 << 18)
    return io.BufferedReader(_BoundedExpansion(plain, size, close), piece)


class _BoundedExpansion(io.RawIOBase):
    def __init__(self, plain: IO[bytes], size: int, close: Callable[[], None]) -> None:
        super().__init__()
        # What lies before a damaged place must come out: ``read`` would lose it with the error.
        self._read: Callable[[int], bytes] = getattr(plain, "read1", plain.read)
        self._close = close
        self._unread = memoryview(b"")  # a slice of it copies nothing: pieces are up to 128 MiB
        self._left = max(EXPANSION_FREE_BYTES, _MAX_EXPANSION * size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._unread or memoryview(self._read(len(buffer)))
        data, self._unread = data[: len(buffer)], data[len(buffer) :]
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it expands more than {_MAX_EXPANSION}-fold, as no text does")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._close()
        super().close()


class ZstdStream(io.RawIOBase):
    """Zstandard frames one after the other; unlike the library's own reader it notices a cut.

    Reading raises :class:`EOFError` where the last frame is cut off, :class:`OSError` where one is
    damaged.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._left_over = b""

    def readable(self) -> bool:
        return True

    def read(self, _: int = -1) -> bytes:
        """The next piece, of the library's choice of size; empty at the end."""
        while True:
            block = self._left_over or self._file.read(_ZSTD_BLOCK)
            self._left_over = b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the last Zstandard frame is not complete")
                return b""
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(
                    max_window_size=_ZSTD_WINDOW
                ).decompressobj()
            try:
                plain = self._frame.decompress(block)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._left_over, self._frame = self._frame.unused_data, None
            if plain:
                return plain


@contextlib.contextmanager
def reporting_damage(where: str, problems: Problems) -> Iterator[None]:
    """Report a truncated or corrupt stream; what was read before it stands."""
    try:
        yield
    except DECOMPRESSION_ERRORS as error:
        problems.report(where, f"truncated or damaged ({error})")


def read_text(path: Path) -> str:
    """A whole UTF-8 file, with or without byte-order mark; line ends become LF.

    Raises:
        DataError: the file cannot be opened, is truncated, or is not UTF-8.
    """
    content = read_bytes(path)
    if content.startswith(UTF_16_MARKS):
        raise DataError(f"{path}: {UTF_16_MESSAGE}")
    try:
        return normalize_newlines(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start:,}") from error


def read_bytes(path: Path) -> bytes:
    """A whole file, decompressed.

    Raises:
        DataError: as for :func:`open_bytes`, or it is truncated, damaged or too long.
    """
    try:
        with open_bytes(path) as file:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise _too_long(str(path), MAX_TEXT_BYTES)
            return read_whole(file, str(path), MAX_TEXT_BYTES)
    except DECOMPRESSION_ERRORS as error:
        raise DataError(f"{path}: truncated or damaged ({error})") from error


def read_whole(file: IO[bytes], where: str, most: int) -> bytes:
    """All that is left of ``file``, of at most ``most`` bytes: a file may be larger than memory,
    and standard input have no end.

    Raises:
        DataError: it is longer.
    """
    content = io.BytesIO()
    while piece := file.read(_PIECE_BYTES):
        if content.tell() + len(piece) > most:
            raise _too_long(where, most)
        content.write(piece)
    return content.getvalue()


def _too_long(where: str, most: int) -> DataError:
    return DataError(f"{where}: longer than {most:,} bytes, too long for one text: cut it up")


def read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, bytes]]:
    """Numbers (from 1) and bytes of a file's lines, line ends included; damage is reported, and so
    is a file in UTF-16, whose bytes are no lines.

    Raises:
        DataError: a line is too long to be a document.
    """
    with open_bytes(path) as file, reporting_damage(str(path), problems):
        number = 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if number == 1 and line.startswith(UTF_16_MARKS):
                problems.report(str(path), UTF_16_MESSAGE)
                return
            if len(line) > MAX_DOCUMENT_BYTES:
                raise DataError(f"{path}, line {number}: longer than {MAX_DOCUMENT_BYTES:,} bytes")
            yield number, line


def normalize_newlines(text: str) -> str:
    """CR LF, lone CR and the CR CR LF of twice-converted files become one LF each."""
    return re.sub(r"\r+\n|\r", "\n", text) if "\r" in text else text
