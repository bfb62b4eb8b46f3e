"""Get a corpus ready for tools/preprocess.py: downloaded or read, cleaned, written as JSONL.

    python tools/prepare_data.py book --output data            # War and Peace, or else the Bible
    python tools/prepare_data.py war_and_peace --output data --input 2600-0.txt
    python tools/prepare_data.py tolstoy --output data         # train and validation files
    python tools/prepare_data.py enron --output data --input maildir
    python tools/prepare_data.py instructions --output data    # for launchers/finetune.py

Each line of the output is one document, {"text": ..., "meta": ...}; of instructions, short
tasks made by rules, one task with its answer. A file appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from megaegpt.arguments import ArgumentParser, path
from megaegpt.bars import progress_bar
from megaegpt.data.readers import READERS, parse_reader_options, read_documents
from megaegpt.data.readers.books import BOOKS, Cleaning, king_james_bible, load_book
from megaegpt.data.readers.documents import Document, LeftOut, Problems
from megaegpt.data.readers.download import download
from megaegpt.errors import DataError, exits_cleanly
from megaegpt.files import (
    LOCK,
    locked_folder,
    made_folder,
    naming_failures,
    temporary_name,
    whole_file,
    write_whole,
)

_OPENWEBTEXT = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/"
DOWNLOADS = {
    "enron": ("https://www.cs.cmu.edu/~enron/enron_mail_20150507.tar.gz",),
    "openwebtext": tuple(f"{_OPENWEBTEXT}urlsf_subset{n:02d}.tar" for n in range(21)),
    "wikipedia": (
        "https://dumps.wikimedia.org/enwiki/latest/enwiki-latest-pages-articles.xml.bz2",
    ),
}
"""Raw corpora that may be downloaded; their compression carries checksums that reading verifies."""
TOLSTOY = {"train": ("war_and_peace", "anna_karenina"), "validation": ("moby_dick",)}


@exits_cleanly
def main() -> None:
    """Prepare the corpus named on the command line and print the files it is in."""
    arguments = parse_arguments()
    output = arguments.output
    with made_folder(output), locked_folder(output):  # downloads are in it too
        paths = _prepare(arguments)
    for made in paths:
        print(made)


def parse_arguments() -> argparse.Namespace:
    """Read the command line, or end the program with a line on what is wrong with it."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*BOOKS, "king_james_bible", "book", "tolstoy", "instructions", *READERS]
    parser.add_argument("name", choices=names, help="corpus; 'book': the best one to be had here")
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--input", type=path, metavar="PATH", help="file or folder to read instead of downloading"
    )
    parser.add_argument(
        "--keep-wraps", action="store_true", help="keep a book's hard line breaks at 70 columns"
    )
    parser.add_argument(
        "--straight-quotes", action="store_true", help="typographic quotation marks become straight"
    )
    parser.add_argument(
        "--doubled-newlines",
        action="store_true",
        help="every line end twice: the text on which the original EGPT figures were measured",
    )
    parser.add_argument(
        "--reader-option",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="option of a corpus' reader, such as text_column=maintext; may be repeated",
    )
    parser.add_argument("--on-bad-input", choices=["fail", "skip"], default="fail")
    arguments = parser.parse_args()
    _refuse_useless(parser, arguments)
    return arguments


def _refuse_useless(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What would change nothing for this corpus must not pass unused."""
    name = arguments.name
    useless = ["reader_option", "on_bad_input"]
    if name in READERS:
        useless = ["keep_wraps", "straight_quotes", "doubled_newlines"]
    elif name in ("king_james_bible", "instructions"):
        useless += ["keep_wraps", "straight_quotes", "doubled_newlines", "input"]
    if name == "tolstoy" and arguments.input is not None and arguments.input.is_file():
        parser.error("--input for tolstoy is a folder with the three books, not one file")
    given = [key for key in useless if getattr(arguments, key) != parser.get_default(key)]
    if given:
        options = ", ".join("--" + key.replace("_", "-") for key in given)
        hint = "; its reader has options of its own (--reader-option)" if name in READERS else ""
        parser.error(f"{options} would change nothing for {name}: leave it out{hint}")


def _prepare(arguments: argparse.Namespace) -> list[Path]:
    """Write the corpus; returns its files."""
    name, output = arguments.name, arguments.output
    if name == "tolstoy":
        return [
            write_jsonl(output / f"tolstoy_{split}.jsonl", [_load(b, arguments) for b in books])
            for split, books in TOLSTOY.items()
        ]
    target = output / f"{name}.jsonl"
    if name == "instructions":
        return [_write_exercises(target)]
    if name in READERS:
        return [_prepare_corpus(target, arguments)]
    if name == "book":
        return [_prepare_any_book(target, arguments)]
    document = king_james_bible() if name == "king_james_bible" else _load(name, arguments)
    return [write_jsonl(target, [document])]


def _prepare_any_book(target: Path, arguments: argparse.Namespace) -> Path:
    """War and Peace, or the Bible where that cannot be had.

    The choice is made once: an existing file is kept, so that a run that was interrupted goes on
    with the same text even when the network has come or gone in between. A file that is named is
    read.
    """
    if target.exists() and arguments.input is None:
        print(f"text: {_title_of(target)} (prepared before)")
        return target
    try:
        document = _load("war_and_peace", arguments)
    except DataError as error:
        if arguments.input is not None:
            raise
        print(f"{error}\nfalling back to the King James Bible")
        document = king_james_bible()
    print(f"text: {document.metadata['title']}")
    return write_jsonl(target, [document])


def _title_of(prepared: Path) -> str:
    """The title of the book that an earlier run has prepared."""
    try:
        with prepared.open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["meta"]["title"])
    except OSError as error:
        raise DataError(f"cannot read {prepared}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DataError(
            f"{prepared} is not what this program writes: remove it, or choose another --output"
        ) from None


def _prepare_corpus(target: Path, arguments: argparse.Namespace) -> Path:
    """Read a corpus in its native format, downloaded if it is nowhere given."""
    name, sources = arguments.name, [arguments.input]
    options = parse_reader_options(name, arguments.reader_option)
    if arguments.input is None and name not in DOWNLOADS:
        raise DataError(f"{name} cannot be downloaded freely: give its files by --input PATH")
    if arguments.input is None:
        folder = arguments.output / "downloads"
        sources = [_download(url, folder / url.rpartition("/")[2]) for url in DOWNLOADS[name]]
    ours = {p.resolve() for p in (target, temporary_name(target), target.with_name(LOCK))}
    left_out = LeftOut(written=lambda path: path.resolve() in ours)
    problems = Problems(arguments.on_bad_input, left_out=left_out)
    documents = read_documents(name, sources, problems, **options)
    write_jsonl(target, progress_bar(documents, unit=" documents"), problems)
    if problems.count:
        print(problems.summary())
    for line in problems.left_out.lines():
        print(line)
    return target


def _download(url: str, target: Path) -> Path:
    print(f"downloading {url}")
    with progress_bar(unit="B", unit_scale=True) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return download(url, target, progress=show)


def _load(name: str, arguments: argparse.Namespace) -> Document:
    cleaning = Cleaning(
        keep_wraps=arguments.keep_wraps,
        straight_quotes=arguments.straight_quotes,
        doubled_newlines=arguments.doubled_newlines,
        squeeze_blank_lines=arguments.doubled_newlines and arguments.name == "tolstoy",
    )
    downloads = arguments.output / "downloads"
    return load_book(BOOKS[name], cleaning, downloads, local=arguments.input)


def write_jsonl(
    path: Path, documents: Iterable[Document], problems: Problems | None = None
) -> Path:
    """Write documents one a line, under a temporary name until all are on disk.

    Raises:
        DataError: there are none, or the disk is full; what was at ``path`` before is untouched.
    """
    problems = problems or Problems()
    with naming_failures(path), whole_file(path) as temporary, temporary.open("wb") as file:
        for document in documents:
            if _is_text(document.text):
                file.write(_line_of(document))
            else:
                problems.report(document.where, "holds half of a surrogate pair")
        if not file.tell():
            why = problems.why_nothing()
            raise DataError(f"{path}: not written, there are no documents{why}")
    return path


def _write_exercises(path: Path) -> Path:
    """In Alpaca's form, a record a line."""
    from megaegpt.data.instruction.exercises import exercises  # imports torch

    rows = (
        {"instruction": task.instruction, "input": task.context, "output": task.response}
        for task in exercises()
    )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, lines.encode())
    return path


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _line_of(document: Document) -> bytes:
    """JSON escapes what is no UTF-8 in the metadata, such as bytes of a file's name."""
    fields = {"text": document.text, "meta": dict(document.metadata)}
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


if __name__ == "__main__":
    main()
