"""Every source through preprocessing: its native format in, its text out of the shards."""

from __future__ import annotations

import functools
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaegpt.data.preprocess.corpus import PreprocessOptions, Report, preprocess
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.shards import Shard, ShardSummary, ShardWriter
from megaegpt.data.tokens.stream import resolve_prefixes
from megaegpt.errors import DataError
from tests.data.readers import test_cnn, test_enron, test_gutenberg, test_openwebtext
from tests.data.readers import test_wikipedia as wiki
from tests.data.readers.reading import read, texts
from tools import preprocess as preprocess_program

TOKENIZER = Tokenizer.load()


def run(output: Path, source: str, *inputs: Path, **options: Any) -> Report:
    paths = tuple(str(path) for path in inputs)
    return preprocess(PreprocessOptions(output, paths, kind=source, **options))


def documents(prefix: Path) -> list[str]:
    found = []
    for shard in map(Shard, resolve_prefixes([str(prefix)])):
        for number in range(shard.num_documents):
            tokens = shard.document(number).tolist()
            assert tokens.pop() == TOKENIZER.eot_token
            found.append(TOKENIZER.decode(tokens))
    return found


def make_gutenberg(folder: Path) -> None:
    book = test_gutenberg.HEADER + test_gutenberg.BODY + test_gutenberg.FOOTER
    test_gutenberg.write(folder / "clock.txt", book, "utf-8-sig")


def make_cnn(folder: Path) -> None:
    rows = [test_cnn.row(n, f"(CNN)Article {n}.Ends here, “so”") for n in range(3)]
    (folder / "a.csv").write_bytes(test_cnn.table(*rows, test_cnn.row(3, "")))


def make_enron(folder: Path) -> None:
    for number in (1, 2, 10):
        test_enron.put(folder, f"inbox/{number}.", test_enron.message(f"mail {number}\n> old"))


def make_openwebtext(folder: Path) -> None:
    subsets = [test_openwebtext.subset(pages) for pages in test_openwebtext.PAGES]
    test_openwebtext.write(folder / "a.tar", test_openwebtext.outer(*subsets))


def make_wikipedia(folder: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    pages = [wiki.page(f"P{n}", f"A '''page''' about [[number|{n}]].", n) for n in range(5)]
    wiki.write(folder / "a.xml.bz2", wiki.dump(*pages, wiki.page("R", "#REDIRECT [[P1]]", 9)))


def make_parquet(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    from tests.data.readers import test_parquet

    test_parquet.write(folder / "a.parquet", ["Здравствуй", "мир"])


def make_transwebedu(folder: Path) -> None:
    for number in (10, 2):
        line = json.dumps({"text": f"морская вода {number}"}) + "\n"
        (folder / f"ru_chunk{number}.jsonl").write_text(line)


MAKERS: dict[str, Callable[[Path], None]] = {
    "gutenberg": make_gutenberg,
    "cnn": make_cnn,
    "enron": make_enron,
    "openwebtext": make_openwebtext,
    "wikipedia": make_wikipedia,
    "parquet": make_parquet,
    "transwebedu": make_transwebedu,
}


@pytest.mark.parametrize("source", MAKERS)
def test_shards_decode_to_the_texts_that_the_reader_yields(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    MAKERS[source](folder)
    expected = texts(read(source, folder))
    report = run(tmp_path / "out", source, folder)
    assert documents(tmp_path / "out" / "train") == expected
    assert report.manifest.counts["documents"] == len(expected) >= 1


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gutenberg": (lambda f: (f / "z.txt").write_text("no book"), r"z\.txt: no '\*\*\* START OF"),
    "cnn": (lambda f: (f / "z.csv").write_bytes(test_cnn.table(["1"])), "z.csv, row 1 .*1 fields"),
    "enron": (lambda f: test_enron.put(f, "z/9.", b"\x89PNG\r\n"), r"9\.: not a mail message"),
    "openwebtext": (
        lambda f: (f / "z.tar").write_bytes((f / "a.tar").read_bytes()[:700]),
        r"z\.tar.*truncated",
    ),
    "wikipedia": (lambda f: (f / "z.xml").write_text("<mediawiki>"), r"z\.xml: truncated or damag"),
    "parquet": (
        lambda f: (f / "z.parquet").write_bytes((f / "a.parquet").read_bytes()[:99]),
        r"z\.parquet: truncated, damaged",
    ),
    "transwebedu": (
        lambda f: (f / "z.jsonl").write_text('{"text": "cut'),
        r"z\.jsonl, line 1: the file ends within this line",
    ),
}


@pytest.mark.parametrize("source", MAKERS)
def test_bad_input_of_every_source_stops_the_run_without_a_shard_or_is_counted(
    tmp_path: Path, source: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    MAKERS[source](folder)
    expected = texts(read(source, folder))
    spoil, message = BAD_FILES[source]
    spoil(folder)
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path / "out", source, folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    report = run(tmp_path / "out", source, folder, on_bad_input="skip")
    assert documents(tmp_path / "out" / "train")[: len(expected)] == expected
    assert report.manifest.counts["bad_inputs"] >= 1


def make_dump(folder: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    for part in range(4):
        pages = [
            wiki.page(f"P{part}.{n}", f"'''Page''' {n} of {part}. " * 20, n) for n in range(60)
        ]
        wiki.write(folder / f"part{part}.xml", wiki.dump(*pages))


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path) -> None:
    make_dump(tmp_path / "in")
    for workers in (1, 2, 3):
        run(tmp_path / f"{workers}", "wikipedia", tmp_path / "in", workers=workers, shards=3)
    one, two, three = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("train*"))}
        for name in ("1", "2", "3")
    )
    assert len(one) == 6
    assert one == two == three
    assert all(len(content) > 0 for content in one.values())


def pack_tar(path: Path, contents: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(contents):
            member = tarfile.TarInfo(f"{number:03}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def pack_zip(path: Path, contents: list[str]) -> None:
    """Two tables, and the directory that is read first at the end."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in (("a.csv", contents[:100]), ("b.csv", contents[100:])):
            archive.writestr(name, test_cnn.table(*(test_cnn.row(1, text) for text in part)))


def pack_parquet(path: Path, contents: list[str], group: int = 400) -> None:
    pytest.importorskip("pyarrow")
    from tests.data.readers import test_parquet

    test_parquet.write(path, list(contents), group=group)


@pytest.mark.parametrize(
    ("source", "name", "pack"),
    [
        ("openwebtext", "corpus.tar", pack_tar),
        ("cnn", "corpus.zip", pack_zip),
        ("parquet", "corpus.parquet", pack_parquet),
        ("parquet", "corpus.parquet", functools.partial(pack_parquet, group=70)),
    ],
)
def test_one_archive_fills_every_shard(
    tmp_path: Path, source: str, name: str, pack: Callable[[Path, list[str]], None]
) -> None:
    """Its size is that on disk, and so is how far it is read."""
    words = np.random.default_rng(0).integers(0, 1 << 30, (400, 400))
    contents = [" ".join(map(str, row)) for row in words]
    pack(tmp_path / name, contents)
    run(tmp_path / "out", source, tmp_path / name, shards=4)
    shards = [Shard(prefix) for prefix in resolve_prefixes([str(tmp_path / "out" / "train")])]
    counts = [shard.num_documents for shard in shards]
    assert min(counts) > 50, counts
    assert documents(tmp_path / "out" / "train") == contents


def test_a_killed_run_goes_on_within_a_file_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [f"Row {number}. " * 100 for number in range(400)]
    pack_parquet(tmp_path / "rows.parquet", contents)
    finish, finished = ShardWriter.finish, []

    def finish_some(writer: ShardWriter, *arguments: Any) -> ShardSummary:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(finish(writer, *arguments))
        return finished[-1]

    monkeypatch.setattr(ShardWriter, "finish", finish_some)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", "parquet", tmp_path / "rows.parquet", shards=4)
    monkeypatch.undo()
    assert all(shard.documents > 50 for shard in finished)
    run(tmp_path / "out", "parquet", tmp_path / "rows.parquet", shards=4)
    assert documents(tmp_path / "out" / "train") == contents


def test_changed_reader_options_are_another_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    make_enron(folder)
    run(tmp_path / "out", "enron", folder)
    with pytest.raises(DataError, match="other inputs or options"):
        run(tmp_path / "out", "enron", folder, reader_options={"keep_quoted": True})


def test_the_program_takes_format_column_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"maintext": "Grüße"}\n')
    command = ["preprocess.py", str(source), "--output", str(tmp_path / "out"), "--quiet"]
    command += ["--workers", "1", "--format", "transwebedu"]
    monkeypatch.setattr(sys, "argv", [*command, "--text-key", "maintext"])
    preprocess_program.main()
    assert documents(tmp_path / "out" / "train") == ["Grüße"]
    monkeypatch.setattr(sys, "argv", [*command, "--reader-option", "text_colum=a"])
    with pytest.raises(SystemExit):
        preprocess_program.main()
    assert "did you mean 'text_column'" in capsys.readouterr().err
