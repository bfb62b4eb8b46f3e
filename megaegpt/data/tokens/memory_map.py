"""Files as arrays over their memory maps."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.errors import DataError
from megaegpt.files import check_regular

MAX_RESIDENT_BYTES = 1 << 27
"""Bytes of memory-mapped files that a process keeps resident before it drops their pages."""

_AROUND_A_READ = 1 << 17  # what the kernel maps beside the pages asked for, roughly


_MOST_OPEN_FILES = 1 << 16


@functools.cache
def allow_many_maps() -> None:
    """Let this process open as many files as it may: a map keeps its file open, large corpora and
    feature stores are hundreds of files, and the usual limit, a soft one, is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # a system may have a lower one of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def map_bytes(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only uint8 array over its memory map.

    A plain array and not ``numpy.memmap``: slicing the subclass costs several times as much.

    Raises:
        DataError: the file cannot be read.
    """
    allow_many_maps()
    try:
        check_regular(path)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return np.empty(0, dtype=np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None


class ResidentPages:
    """Keeps memory-mapped files that are read here and there from becoming resident altogether.

    Whoever reads notes it; after about 128 MiB the pages are let go of. They stay in the system's
    cache and are mapped again when they are read. Small files stay, which is faster.

    Args:
        total: bytes of all files together.
    """

    def __init__(self, total: int) -> None:
        self._most = MAX_RESIDENT_BYTES if total > 2 * MAX_RESIDENT_BYTES else None
        self._resident = 0

    def note(self, reads: int, size: int, files: Iterable[np.ndarray]) -> None:
        """``reads`` places of ``size`` bytes in all have been, or will be, read in ``files``."""
        if self._most is None:
            return
        self._resident += reads * _AROUND_A_READ + size
        if self._resident > self._most:
            self._resident = 0
            for content in files:
                drop_pages(content)


def drop_pages(content: np.ndarray) -> None:
    """Take the pages behind an array over a map out of this process' memory."""
    owner: Any = content
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap):  # an empty file has no map
        owner.madvise(mmap.MADV_DONTNEED)
