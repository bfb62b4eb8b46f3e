"""Tar archives read as a stream: nothing is extracted, and a cut one does not pass for whole."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megaegpt.data.readers.documents import Problems
from megaegpt.data.readers.inputs import DECOMPRESSION_ERRORS, MAX_DOCUMENT_BYTES, ends_in

_BLOCK = 512
_DAMAGE = (*DECOMPRESSION_ERRORS, tarfile.TarError)


class _Watched(io.RawIOBase):
    """Passes bytes through and remembers the last block, which must be zeros in a whole archive."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        # No more than is there: what lies before a damaged place must come out.
        self._read: Callable[[int], bytes] = getattr(file, "read1", file.read)
        self._last = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._read(size)
        self._last = (self._last + data[-_BLOCK:])[-_BLOCK:]
        return data

    def ends_like_a_tar(self) -> bool:
        """Read what is left; whether the archive's end mark is there."""
        while self.read(1 << 16):
            pass
        return self._last == bytes(_BLOCK)


def read_members(
    file: IO[bytes], where: str, problems: Problems
) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and bytes of each regular file in an uncompressed tar stream, in its order.

    Each member must be read before the next is asked for. Names are not to be used as paths: they
    may be absolute or climb out of the archive. A truncated or damaged archive is reported.

    Args:
        file: the stream; it is never sought in.
        where: its name.
    """
    watched = _Watched(file)
    try:
        with tarfile.open(fileobj=watched, mode="r|", bufsize=1 << 16) as archive:
            while (member := archive.next()) is not None:
                # or every header stays in memory
                archive.members.clear()  # type: ignore[attr-defined]
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield member.name, member.size, content
        if not watched.ends_like_a_tar():
            problems.report(where, "truncated: the archive's end mark is missing")
    except _DAMAGE as error:
        problems.report(where, f"truncated or damaged archive ({error})")


def read_small(
    name: str, size: int, content: IO[bytes], where: str, problems: Problems
) -> bytes | None:
    """A member's bytes; None after reporting that it is damaged or too large to be a document."""
    if size > MAX_DOCUMENT_BYTES:
        problems.report(f"{where}:{name}", f"larger than {MAX_DOCUMENT_BYTES:,} bytes")
        return None
    try:
        return content.read()
    except _DAMAGE as error:
        problems.report(f"{where}:{name}", f"truncated or damaged ({error})")
        return None


def is_tar_name(path: Path | str) -> bool:
    """Whether a name is that of a tar archive, compressed or not."""
    return ends_in(str(path), (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst"))
