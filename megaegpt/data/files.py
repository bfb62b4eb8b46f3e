"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.errors import DataError

TEMPORARY_SUFFIX = ".tmp"

_RESIDENT_BYTES = 1 << 27
_AROUND_A_READ = 1 << 17  # what the kernel maps beside the pages asked for, roughly


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written before it is complete; a rerun reuses the name."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


@contextlib.contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a :class:`DataError` with the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None


def publish(temporary: Path, path: Path) -> None:
    """Give a fully written, fsynced file its final name, durably."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file under its temporary name, then publish it.

    Raises:
        DataError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = temporary_name(path)
    try:
        with naming_failures(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
    except DataError:
        temporary.unlink(missing_ok=True)
        raise


def map_bytes(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only uint8 array over its memory map.

    A plain array and not ``numpy.memmap``: slicing the subclass costs several times as much.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.empty(0, dtype=np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


class ResidentPages:
    """Keeps memory-mapped files that are read here and there from becoming resident altogether.

    Whoever reads notes it; after about 128 MiB the pages are let go of. They stay in the system's
    cache and are mapped again when they are read. Small files stay, which is faster.

    Args:
        total: bytes of all files together.
    """

    def __init__(self, total: int) -> None:
        self._most = _RESIDENT_BYTES if total > 2 * _RESIDENT_BYTES else None
        self._resident = 0

    def note(self, reads: int, size: int, files: Iterable[np.ndarray]) -> None:
        """``reads`` places of ``size`` bytes in all have been, or will be, read in ``files``."""
        if self._most is None:
            return
        self._resident += reads * _AROUND_A_READ + size
        if self._resident > self._most:
            self._resident = 0
            for content in files:
                _drop_pages(content)


def _drop_pages(content: np.ndarray) -> None:
    """Take the pages behind an array over a map out of this process' memory."""
    owner: Any = content
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap):  # an empty file has no map
        owner.madvise(mmap.MADV_DONTNEED)


def umask() -> int:
    """The bits that the user wants new files not to have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[int]:
    """Lock an output folder against other runs; gives the lock's file descriptor.

    The lock lasts until every process that has the descriptor has closed it.

    Raises:
        DataError: another run has locked it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        raise DataError(f"{folder} is being written by another run") from None
    finally:
        os.close(handle)
