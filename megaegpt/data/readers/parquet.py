"""Parquet files, one row group at a time (needs the optional package pyarrow)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import expand
from megaegpt.data.readers.json_lines import IDENTITY_COLUMNS, metadata_of, text_of
from megaegpt.errors import DataError
from megaegpt.files import LFS_POINTER_MESSAGE, is_lfs_pointer

SUFFIXES = (".parquet",)
_ROWS_AT_ONCE = 256


def read(
    paths: Iterable[Path], problems: Problems, *, text_column: str = "text"
) -> Iterator[Document]:
    """One document a row; folders are searched for ``*.parquet``, in numeric order.

    Only the text and the columns that identify a document are read from disk.

    Args:
        text_column: name of the column that holds the text.

    Raises:
        DataError: pyarrow is missing, or the file has no such column.
    """
    pyarrow = _pyarrow()
    for path in expand(paths, SUFFIXES, problems.left_out):
        try:
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
                columns = _columns(file, text_column, path)
                yield from _rows(file, columns, text_column, path, problems)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            what = f"truncated, damaged or not parquet ({reason})"
            problems.report(str(path), LFS_POINTER_MESSAGE if is_lfs_pointer(path) else what)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading parquet needs pyarrow: pip install 'megaegpt[parquet]'") from error
    return pyarrow


def _columns(file: Any, text_column: str, path: Path) -> list[str]:
    names = file.schema_arrow.names
    if text_column not in names:
        raise DataError(
            f"{path}: no text column {text_column!r}; the columns are {', '.join(names)} "
            "(name one by text_column)"
        )
    return [text_column, *(n for n in IDENTITY_COLUMNS if n in names and n != text_column)]


def _rows(
    file: Any, columns: list[str], text_column: str, path: Path, problems: Problems
) -> Iterator[Document]:
    number, total = 0, max(file.metadata.num_rows, 1)
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
        for row in batch.to_pylist():
            number += 1
            position = f"row {number}"
            text = text_of(row, text_column, f"{path}, {position}", problems)
            if text is not None:
                share = min(number / total, 1.0)  # a row group is read at once, and may be all
                yield Document(text, str(path), position, metadata_of(row), share)
