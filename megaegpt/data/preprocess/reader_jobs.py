"""The documents of a reader, in pieces for the workers of preprocessing.

A reader runs in the main process, from the first file to the last; what it yields is tokenised by
the workers. So the pieces, and the shards they go to, do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megaegpt.data.readers import Option, read_documents, reader_suffixes, wikipedia
from megaegpt.data.readers.documents import Document, LeftOut, Problems
from megaegpt.data.readers.inputs import expand


@dataclass(frozen=True)
class Documents:
    """Documents that a reader has yielded, and what it could not read after the last of them."""

    texts: tuple[str, ...]
    places: tuple[str, ...]
    """File and place of each text, for messages."""
    problems: tuple[tuple[str, str], ...] = ()
    """Places, and what is wrong there."""
    are_wikitext: tuple[bool, ...] = ()
    """Which texts are still to be cleaned of markup; empty: none."""

    def finish(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Place and final text of each document, and all problems; the slow part of reading."""
        problems = CollectedProblems()
        finished = []
        marks = self.are_wikitext or (False,) * len(self.texts)
        for text, place, is_wikitext in zip(self.texts, self.places, marks, strict=True):
            prose = wikipedia.clean_or_report(text, place, problems) if is_wikitext else text
            if prose:
                finished.append((place, prose))
        return finished, [*problems.found, *self.problems]


class CollectedProblems(Problems):
    """Keeps what a reader reports, to be raised or counted when its turn among the jobs comes."""

    def __init__(self, left_out: LeftOut | None = None) -> None:
        super().__init__("skip", left_out=left_out)
        self.found: list[tuple[str, str]] = []

    def report(self, where: str, what: str) -> None:
        self.found.append((where, what))


def measure(path: str, source: str, left_out: LeftOut | None = None) -> tuple[int, int]:
    """Bytes of a file or of the files below a folder that a reader takes, and the newest mtime_ns.

    Args:
        left_out: told of the files below the folder that the reader does not take.

    Raises:
        DataError: nothing is there.
    """
    size = newest = 0
    for file in expand([Path(path)], reader_suffixes(source), left_out):
        state = file.stat()
        size += state.st_size
        newest = max(newest, state.st_mtime_ns)
    return size, newest


def read_pieces(
    path: str,
    source: str,
    options: Mapping[str, Option],
    characters: int,
    left_out: LeftOut | None = None,
) -> Iterator[tuple[int, Documents]]:
    """Pieces of about ``characters``, each with the bytes that are read of the files by then.

    Args:
        left_out: told of the members of archives that the reader does not take; the files below a
            folder are those that :func:`measure` has told.

    Raises:
        DataError: input that no policy lets pass, such as a file of another kind.
    """
    left_out = left_out or LeftOut()
    finished, current = 0, _Opened()

    def files() -> Iterator[Path]:
        nonlocal finished, current
        known = LeftOut(left_out.written)
        for file in expand([Path(path)], reader_suffixes(source), known):
            current = _Opened(file)
            yield current
            finished += file.stat().st_size  # the next is asked for, so this one is done
            current = _Opened()

    problems = CollectedProblems(left_out)
    waiting: list[tuple[str, str, bool]] = []
    size = done = 0
    for document, is_wikitext in _documents(source, files(), problems, options):
        if problems.found or size >= characters:  # problems were met before this document
            yield done, _piece(waiting, problems)
            waiting, size = [], 0
        done = max(done, finished + current.position(document.share_read))
        waiting.append((document.text, document.where, is_wikitext))
        size += len(document.text)
    if waiting or problems.found:
        yield finished, _piece(waiting, problems)


class _Opened(type(Path())):  # type: ignore[misc]
    """A path that knows how far its file is read, as it lies on disk: an archive may be all of a
    corpus, and is cut into shards too. Deterministic, since one reader reads it from its start.
    """

    _file: IO[bytes] | None = None

    def open(self, *args: Any, **kwargs: Any) -> IO[Any]:
        file: IO[Any] = super().open(*args, **kwargs)
        self._file = file
        return file

    def position(self, share_read: float) -> int:
        """Bytes; of a file that is read by other means, the share that its reader tells of."""
        if (file := self._file) is None:
            return int(share_read * self.stat().st_size)
        return self.stat().st_size if file.closed else file.tell()


def _documents(
    source: str, files: Iterator[Path], problems: Problems, options: Mapping[str, Option]
) -> Iterator[tuple[Document, bool]]:
    """Documents, and whether their markup is left for the workers to clean."""
    if source == "wikipedia" and not options.get("keep_wikitext"):
        drop = bool(options.get("drop_disambiguation"))
        yield from wikipedia.read_marked(files, problems, drop_disambiguation=drop)
        return
    for document in read_documents(source, files, problems, **options):
        yield document, False


def _piece(waiting: list[tuple[str, str, bool]], problems: CollectedProblems) -> Documents:
    texts, places, marks = zip(*waiting, strict=True) if waiting else ((), (), ())
    piece = Documents(texts, places, tuple(problems.found), marks if any(marks) else ())
    problems.found.clear()
    return piece
