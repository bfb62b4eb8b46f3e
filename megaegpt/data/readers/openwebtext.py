"""OpenWebText: tar archives of ``*_data.xz``, each of which is itself a tar of text files.

Despite their name the inner files are not text under xz: read as such they would put tar headers
and zero bytes into the corpus. All of it is read as a stream, nothing is extracted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from megaegpt.data.readers import parquet
from megaegpt.data.readers.archives import is_tar_name, read_members, read_small
from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import decompressed, ends_in, expand, is_hidden_member, open_bytes

SUFFIXES = (".tar", ".xz", ".parquet")
_BLANK_LINES = re.compile(r"\n{3,}")
_MAX_DEPTH = 2  # openwebtext.tar.xz holds *_data.xz, which hold *.txt


def read(
    paths: Iterable[Path], problems: Problems, *, text_column: str = "text"
) -> Iterator[Document]:
    """One document a web page; more than one blank line in a row becomes one.

    Args:
        paths: ``openwebtext.tar.xz``, the plain tars of its parts, ``*_data.xz`` files, or folders
            of these or of parquet.
        text_column: the text's column, in parquet.
    """
    for path in expand(paths, SUFFIXES, problems.left_out):
        if ends_in(path.name, parquet.SUFFIXES):
            yield from parquet.read([path], problems, text_column=text_column)
            continue
        with open_bytes(path) as file:
            yield from _archive(file, str(path), "", problems, depth=1)


def _archive(
    file: IO[bytes], source: str, prefix: str, problems: Problems, depth: int
) -> Iterator[Document]:
    """Documents of a tar stream and of the archives inside it."""
    where = f"{source}:{prefix}".rstrip(":/")
    for name, size, content in read_members(file, where, problems):
        if is_hidden_member(name):
            problems.left_out.add(f"{where}:{name}", "hidden")
        elif ends_in(name, (".txt",)):
            data = read_small(name, size, content, where, problems)
            if data is not None:
                yield from _document(data, source, prefix + name, problems)
        elif ends_in(name, (".xz",)) or is_tar_name(name):
            if depth == _MAX_DEPTH:
                problems.report(f"{where}:{name}", "an archive where only text files belong")
                continue
            inner = decompressed(content, Path(name).suffix, size)
            yield from _archive(inner, source, f"{prefix}{name}/", problems, depth + 1)
        else:
            problems.left_out.add(f"{where}:{name}", "members that are no .txt or archive")


def _document(data: bytes, source: str, name: str, problems: Problems) -> Iterator[Document]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.report(f"{source}:{name}", f"not UTF-8 at byte {error.start:,}")
        return
    text = _BLANK_LINES.sub("\n\n", text).strip()
    if text:
        yield Document(text, source, name, {"id": name})
