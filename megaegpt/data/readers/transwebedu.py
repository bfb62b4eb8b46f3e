"""TransWebEdu (machine-translated FineWeb-Edu): JSON Lines chunks or their parquet conversion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from megaegpt.data.readers import json_lines, parquet
from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import ends_in, expand

SUFFIXES = (*json_lines.SUFFIXES, *parquet.SUFFIXES)


def read(
    paths: Iterable[Path], problems: Problems, *, text_column: str = "text"
) -> Iterator[Document]:
    """One document a row, chunks in numeric order (``fr_chunk2`` before ``fr_chunk10``).

    Args:
        paths: ``*.jsonl`` or ``*.parquet`` files, or folders of them.
        text_column: name of the column that holds the text.
    """
    for path in expand(paths, SUFFIXES, problems.left_out):
        reader = parquet if ends_in(path.name, parquet.SUFFIXES) else json_lines
        yield from reader.read([path], problems, text_column=text_column)
