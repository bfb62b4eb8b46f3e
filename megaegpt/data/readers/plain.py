"""Plain text files: one document a file, as it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import expand, read_text
from megaegpt.errors import DataError

SUFFIXES = (".txt", ".md", ".txt.gz", ".txt.bz2", ".txt.xz", ".txt.zst")


def read(paths: Iterable[Path], problems: Problems) -> Iterator[Document]:
    """One document a UTF-8 file, compressed or not; folders are searched for text files."""
    for path in expand(paths, SUFFIXES, problems.left_out):
        try:
            text = read_text(path)
        except DataError as error:
            problems.report(str(path), str(error).removeprefix(f"{path}: "))
            continue
        if not text.strip():
            problems.report(str(path), "the file is empty")
            continue
        yield Document(text, str(path), "")
