"""CNN news articles 2011-2022: ``CNN_Articels_clean.csv``, its second part, or the zip of both.

The set is described on Kaggle (hadasu92/cnn-articles-after-basic-cleaning). Its paragraphs are
joined without a space, each article opens with ``(CNN)``, and headlines end in the site's name.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from megaegpt.data.readers.documents import Document, Problems
from megaegpt.data.readers.inputs import (
    bounded,
    ends_in,
    expand,
    is_hidden_member,
    open_bytes,
    reporting_damage,
)
from megaegpt.data.readers.tables import read_rows
from megaegpt.files import LFS_POINTER_MESSAGE, is_lfs_pointer

SUFFIXES = (".csv", ".csv.gz", ".zip")
_TEXT = "article text"
_METADATA = {
    "author": "author",
    "date published": "date",
    "category": "category",
    "section": "section",
    "url": "url",
}
_DATELINE = re.compile(r"\A\s*\(CNN(?: [A-Z]\w+)*\)\s*")
_SITE = re.compile(r"\s*[-\u2013|] *CNN\w*(?: \w+)?\s*\Z|\s*\(CNN(?: \w+)*\)\s*\Z")
# The end of a sentence right against a capital: the end of a paragraph, unless it is a name.
_SEAM = re.compile(r"[.!?][\u201d\u2019)]?(?=\u201c?[A-Z][\w'\u2019-]*[ ,])")
_LAST_WORD = re.compile(r"[\w'\u2019.@/-]+\Z")
_ABBREVIATIONS = frozenset(
    [
        *("mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "inc", "co", "corp", "ltd", "no"),
        *("gen", "col", "capt", "lt", "sgt", "sen", "rep", "gov", "rev", "prof", "hon", "mt", "ft"),
        *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"),
    ]
)


def read(
    paths: Iterable[Path], problems: Problems, *, keep_raw: bool = False
) -> Iterator[Document]:
    """One document an article; those without text are left out.

    Args:
        keep_raw: leave the text exactly as the file has it.
    """
    for path in expand(paths, SUFFIXES, problems.left_out):
        for name, file in _tables(path, problems):
            with file, reporting_damage(name, problems):
                for position, row in read_rows(file, name, (_TEXT,), problems):
                    text = row[_TEXT] if keep_raw else clean(row[_TEXT])
                    if text.strip():
                        yield Document(text, name, position, _metadata(row))


def clean(text: str) -> str:
    """Without the leading ``(CNN)``, and with a line break where two paragraphs were joined."""
    return _SEAM.sub(_part, _DATELINE.sub("", text)).strip()


def _part(seam: re.Match[str]) -> str:
    """A line break after the sentence, unless its last word is an abbreviation or in a name."""
    stop, start = seam[0], seam.start()
    last_word = _LAST_WORD.search(seam.string[max(0, start - 40) : start])
    word = last_word[0] if last_word else ""
    is_initial = len(word) == 1 and word.isupper()
    if not word or any(sign in word for sign in ".@/"):  # U.S., p.m., an address
        return stop
    if stop == "." and (is_initial or word.lower() in _ABBREVIATIONS):
        return stop
    return f"{stop}\n"


def _metadata(row: Mapping[str, str]) -> dict[str, str]:
    found = {new: row[old].strip() for old, new in _METADATA.items() if row.get(old, "").strip()}
    headline = _SITE.sub("", row.get("headline", "")).strip()
    return {"title": headline, **found} if headline else found


def _tables(path: Path, problems: Problems) -> Iterator[tuple[str, IO[bytes]]]:
    """Each CSV file's name and bytes: the file itself, or the members of a zip in its order."""
    if not ends_in(path.name, (".zip",)):
        yield str(path), open_bytes(path)
        return
    try:
        with path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
            for member in archive.infolist():
                where = f"{path}:{member.filename}"
                if is_hidden_member(member.filename):
                    problems.left_out.add(where, "hidden")
                elif ends_in(member.filename, (".csv",)):
                    plain = archive.open(member)
                    yield where, bounded(plain, member.compress_size, plain.close)
                elif not member.is_dir():
                    problems.left_out.add(where, "members that are no .csv")
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        what = f"truncated, damaged or encrypted zip ({error})"
        problems.report(str(path), LFS_POINTER_MESSAGE if is_lfs_pointer(path) else what)
