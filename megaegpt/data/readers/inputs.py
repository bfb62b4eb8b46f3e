"""What the readers share: finding files, ordering them, and opening them as bytes or text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from megaegpt.errors import DataError

DECOMPRESSION_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""What Python's decompressors raise on truncated or damaged input."""


def expand(paths: Iterable[Path], suffixes: tuple[str, ...] | None = None) -> Iterator[Path]:
    """Files, in the order given; folders become the files below them.

    Below a folder, hidden files are left out, only names ending in one of ``suffixes`` are taken
    (all names without it), and numbers sort by value: ``chunk2`` before ``chunk10``.

    Raises:
        DataError: a path does not exist, or a folder holds nothing to read.
    """
    for path in paths:
        if path.is_dir():
            yield from _below(path, suffixes)
        elif path.exists():
            yield path
        else:
            raise DataError(f"{path}: no such file or folder")


def _below(folder: Path, suffixes: tuple[str, ...] | None) -> list[Path]:
    files = [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (suffixes is None or path.name.endswith(suffixes))
        and path.is_file()
    ]
    if not files:
        kinds = f" ending in {' or '.join(suffixes)}" if suffixes else ""
        raise DataError(f"{folder}: no files{kinds} in this folder")
    return sorted(files, key=natural_key)


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """A sort key under which digits count as numbers, so part 2 comes before part 10."""
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in pieces]


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading, undoing ``.gz``, ``.bz2``, ``.xz`` or ``.zst`` compression.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        if path.suffix == ".gz":
            return cast(IO[bytes], gzip.open(path))
        if path.suffix == ".bz2":
            return cast(IO[bytes], bz2.open(path))
        if path.suffix == ".xz":
            return cast(IO[bytes], lzma.open(path))
        if path.suffix == ".zst":
            import zstandard

            stream = zstandard.ZstdDecompressor().stream_reader(
                path.open("rb"), read_across_frames=True, closefd=True
            )
            return io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def read_text(path: Path) -> str:
    """A whole UTF-8 file, with or without byte-order mark; line ends become LF.

    Raises:
        DataError: the file cannot be opened, is truncated, or is not UTF-8.
    """
    try:
        with open_bytes(path) as file:
            return normalize_newlines(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start:,}") from error
    except DECOMPRESSION_ERRORS as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def normalize_newlines(text: str) -> str:
    """CR LF, lone CR and the CR CR LF of twice-converted files become one LF each."""
    return re.sub(r"\r+\n|\r", "\n", text) if "\r" in text else text
