"""What a reader yields, in pieces for the workers of preprocessing.

A reader runs in the main process, from the first file to the last; what it yields is tokenised by
the workers. So the pieces, and the shards they go to, do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megaegpt.data.documents import Problems
from megaegpt.data.readers import Option, read_documents, reader_suffixes
from megaegpt.data.readers.inputs import expand


@dataclass(frozen=True)
class Documents:
    """Documents that a reader has yielded, and what it could not read after the last of them."""

    texts: tuple[str, ...]
    places: tuple[str, ...]
    """File and place of each text, for messages."""
    problems: tuple[tuple[str, str], ...] = ()
    """Places, and what is wrong there."""


class _Collected(Problems):
    """Keeps what a reader reports, to be raised or counted when its turn among the jobs comes."""

    def __init__(self) -> None:
        super().__init__("skip")
        self.found: list[tuple[str, str]] = []

    def report(self, where: str, what: str) -> None:
        self.found.append((where, what))


def measure(path: str, source: str) -> tuple[int, int]:
    """Bytes of a file or of the files below a folder that a reader takes, and the newest mtime_ns.

    Raises:
        DataError: nothing is there.
    """
    size = newest = 0
    for file in expand([Path(path)], reader_suffixes(source)):
        state = file.stat()
        size += state.st_size
        newest = max(newest, state.st_mtime_ns)
    return size, newest


def read_pieces(
    path: str, source: str, options: Mapping[str, Option], characters: int
) -> Iterator[tuple[int, Documents]]:
    """Pieces of about ``characters``, each with the bytes of the files that are finished by then.

    Raises:
        DataError: input that no policy lets pass, such as a file of another kind.
    """
    finished = 0

    def files() -> Iterator[Path]:
        nonlocal finished
        for file in expand([Path(path)], reader_suffixes(source)):
            yield file
            finished += (
                file.stat().st_size
            )  # the reader asks for the next file, so it has done this

    problems = _Collected()
    texts: list[str] = []
    places: list[str] = []
    size = 0
    for document in read_documents(source, files(), problems, **options):
        if problems.found:  # met before this document
            yield finished, Documents(tuple(texts), tuple(places), tuple(problems.found))
            problems.found.clear()
            texts, places, size = [], [], 0
        texts.append(document.text)
        places.append(document.where)
        size += len(document.text)
        if size >= characters:
            yield finished, Documents(tuple(texts), tuple(places))
            texts, places, size = [], [], 0
    if texts or problems.found:
        yield finished, Documents(tuple(texts), tuple(places), tuple(problems.found))
