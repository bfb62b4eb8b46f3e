"""How the reader tests read."""

from __future__ import annotations

from pathlib import Path

from megaegpt.data.readers import Option, read_documents
from megaegpt.data.readers.documents import Document, Problems


def read(source: str, *paths: Path, **options: Option) -> list[Document]:
    """All documents; bad input raises."""
    return list(read_documents(source, paths, Problems("fail"), **options))


def read_skipping(source: str, *paths: Path, **options: Option) -> tuple[list[Document], Problems]:
    """All documents, and the problems that were skipped."""
    problems = Problems("skip")
    return list(read_documents(source, paths, problems, **options)), problems


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]
