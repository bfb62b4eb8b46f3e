"""Text to shards: nothing lost, nothing half done, the same bytes for any number of workers."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megaegpt.data.preprocess import corpus
from megaegpt.data.preprocess.corpus import PreprocessOptions, Report, preprocess
from megaegpt.data.preprocess.encode import EncodeOptions
from megaegpt.data.preprocess.jobs import Damage, Job
from megaegpt.data.preprocess.pool import EncoderPool
from megaegpt.data.readers import inputs as input_files
from megaegpt.data.readers.gutenberg import cut_wrapper
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.data.tokens.corpus_manifest import Manifest
from megaegpt.data.tokens.shards import Shard, ShardWriter
from megaegpt.data.tokens.stream import TokenStream, resolve_prefixes
from megaegpt.errors import DataError
from megaegpt.files import LFS_POINTER, locked_folder
from tests.tiny.tokenizers import trained_tokenizer

TOKENIZER = Tokenizer.load()
TEXTS = ["Hello world.", "Zwei\nZeilen, größer.", "日本語 <|endoftext|> text", " spaces  \n\n"]


@pytest.fixture(autouse=True)
def _load_the_vocabulary_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "load", lambda vocabulary=None: TOKENIZER)


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({key: t, "id": n}).encode() + b"\n" for n, t in enumerate(texts))


@functools.cache
def many_texts(count: int = 3000) -> list[str]:
    generator = np.random.default_rng(1)
    words = ["peace", "war", "the", "and", "Prince", "ß", "\n", "1812,"]
    return [
        f"Document {n}: " + " ".join(generator.choice(words, size=generator.integers(1, 60)))
        for n in range(count)
    ]


def run(output: Path, *inputs: Path, **options: Any) -> Report:
    encode = EncodeOptions(**options.pop("encode", {}))
    paths = tuple(str(path) for path in inputs)
    return preprocess(PreprocessOptions(output, paths, encode=encode, **options))


def documents(prefix: Path) -> list[str]:
    """The text of each document of a split, without its end-of-text token."""
    texts = []
    for shard in map(Shard, resolve_prefixes([str(prefix)])):
        shard.verify(TOKENIZER.vocab_size)
        for number in range(shard.num_documents):
            tokens = shard.document(number).tolist()
            assert tokens.pop() == 50256
            texts.append(TOKENIZER.decode(tokens))
    return texts


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_kind_of_input_gives_its_text_back(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deeper").mkdir(parents=True)
    (source / "a.jsonl").write_bytes(jsonl(TEXTS))
    (source / "b2.jsonl.gz").write_bytes(gzip.compress(jsonl(["gzip"])))
    (source / "b10.jsonl.zst").write_bytes(zstandard.compress(jsonl(["zstandard"])))
    (source / "deeper" / "c.txt").write_bytes(b"\xef\xbb\xbfCR LF\r\nand LF\n")
    (source / "d.txt.gz").write_bytes(gzip.compress(b"plain"))
    (source / "ignored.pdf").write_bytes(b"%PDF")
    expected = [*TEXTS, "gzip", "zstandard", "plain", "CR LF\nand LF\n"]
    report = run(tmp_path / "folder", source)
    assert sorted(documents(tmp_path / "folder" / "train")) == sorted(expected)
    assert report.manifest.counts["documents"] == len(expected)
    assert report.manifest.counts["text_bytes"] == sum(len(text.encode()) for text in expected)
    run(tmp_path / "glob", source / "b*.jsonl.*")
    assert documents(tmp_path / "glob" / "train") == ["gzip", "zstandard"]  # 2 before 10
    run(tmp_path / "order", source / "d.txt.gz", source / "a.jsonl")
    assert documents(tmp_path / "order" / "train") == ["plain", *TEXTS]


def test_a_byte_order_mark_blank_lines_and_a_missing_last_newline_are_no_problem(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    run(tmp_path / "out", path)
    assert documents(tmp_path / "out" / "train") == ["one", "two"]


@pytest.mark.parametrize(("shards", "most_workers"), [(1, 2), (3, 3)])
def test_the_number_of_workers_changes_nothing(
    tmp_path: Path, shards: int, most_workers: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(many_texts()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(many_texts(500))))
    outputs = []
    for workers in range(1, most_workers + 1):
        output = tmp_path / f"out{workers}"
        inputs = tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"
        options: dict[str, Any] = {"validation_fraction": 0.1, "deduplicate": True}
        run(output, *inputs, workers=workers, shards=shards, **options)
        outputs.append(files_of(output))
    assert all(output == outputs[0] for output in outputs)
    assert len(outputs[0]) == 1 + 4 * shards
    if shards > 1:
        tokens = [len(s.tokens) for s in TokenStream([f"{tmp_path}/out1/train"]).shards]
        assert min(tokens) > 0.5 * max(tokens)


def test_shards_hold_the_documents_in_the_order_of_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(many_texts()))
    for shards in (1, 4):
        run(tmp_path / f"out{shards}", tmp_path / "a.jsonl", shards=shards)
        assert documents(tmp_path / f"out{shards}" / "train") == many_texts()


BAD_LINES = {
    "malformed": (b'{"text": "cut', "not JSON"),
    "not an object": (b'["text"]', "a JSON list, not an object"),
    "no text": (b'{"body": "x"}', r"no text column 'text'; the columns are 'body'"),
    "null": (b'{"text": null}', "is empty"),
    "number": (b'{"text": 5}', "is of type int"),
    "empty": (b'{"text": ""}', "is empty"),
    "blank": (b'{"text": " \\n"}', "is empty"),
    "not UTF-8": (b'{"text": "\xff\xfe caf\xe9"}', "not UTF-8"),
    "surrogate": (b'{"text": "a\\ud800b"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bad_line_stops_the_run_or_is_counted(tmp_path: Path, case: str, suffix: str) -> None:
    line, message = BAD_LINES[case]
    good = jsonl(many_texts())
    content = good + line + b"\n" + jsonl(TEXTS)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path / "fail", path)
    assert str(error.value).startswith(f"{path}, line 3001: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "fail").exists()
    report = run(tmp_path / "skip", path, on_bad_input="skip")
    assert documents(tmp_path / "skip" / "train") == many_texts() + TEXTS
    assert report.manifest.counts["bad_inputs"] == 1
    assert report.problems.summary().splitlines()[1].startswith(f"  {path}, line 3001: ")


@pytest.mark.parametrize(
    ("name", "content", "where", "message"),
    [
        ("a.txt", b"fine\nfine\n caf\xe9\n", ", line 3", "not UTF-8 at byte 14 of the file"),
        ("a.txt", b"", "", "the file is empty"),
        ("a.txt", b" \n", "", "the file is empty"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-20], "", "truncated or damaged"),
        ("a.txt.gz", b"no gzip", "", "truncated or damaged"),
        ("a.txt", "caf\xe9".encode("utf-16"), "", "text in UTF-16: convert it"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "", "text in UTF-16: convert it"),
        (
            "a.jsonl.gz",
            gzip.compress('{"text": "a"}'.encode("utf-16"), mtime=0),
            "",
            "text in UTF-16",
        ),
    ],
)
def test_a_bad_text_file_stops_the_run_or_is_counted(
    tmp_path: Path, name: str, content: bytes, where: str, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "good.txt").write_text("good")
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path / "fail", tmp_path / "in")
    assert str(error.value).startswith(f"{tmp_path}/in/{name}{where}: ")
    report = run(tmp_path / "skip", tmp_path / "in", on_bad_input="skip")
    assert documents(tmp_path / "skip" / "train") == ["good"]
    assert report.manifest.counts["bad_inputs"] == 1


def test_a_text_that_is_too_long_is_a_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its size where it is plain, piece by piece where it is compressed."""
    monkeypatch.setattr(input_files, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a" * 1001)
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(b"b" * 1001))
    (tmp_path / "in" / "c.txt").write_text("c" * 1000)
    with pytest.raises(DataError, match=r"a\.txt: longer than 1,000 bytes"):
        run(tmp_path / "fail", tmp_path / "in")
    report = run(tmp_path / "skip", tmp_path / "in", on_bad_input="skip")
    assert documents(tmp_path / "skip" / "train") == ["c" * 1000]
    assert "b.txt.gz: longer than 1,000 bytes" in report.problems.summary()


@pytest.mark.parametrize(("suffix", "workers"), [(".gz", 1), (".zst", 1), (".gz", 2)])
def test_a_truncated_archive_is_a_problem_with_a_place(
    tmp_path: Path, suffix: str, workers: int
) -> None:
    texts = many_texts()
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    whole = compress(jsonl(texts))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=r", line \d+: truncated or damaged"):
        run(tmp_path / "fail", path, workers=workers)
    report = run(tmp_path / "skip", path, on_bad_input="skip", workers=workers)
    found = documents(tmp_path / "skip" / "train")
    assert found == texts[: len(found)]
    assert report.manifest.counts["bad_inputs"] == 1


@pytest.mark.parametrize(
    ("kind", "read", "left"),
    [("text", ["# Notes", "a"], ["c.jsonl"]), ("jsonl", ["c"], ["README.md", "a.txt"])],
)
def test_of_a_folder_only_files_of_the_kind_that_is_asked_for_are_read(
    tmp_path: Path, kind: str, read: list[str], left: list[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("a")
    (source / "README.md").write_text("# Notes")
    (source / "c.jsonl").write_bytes(jsonl(["c"]))
    report = run(tmp_path / "out", source, kind=kind)
    assert documents(tmp_path / "out" / "train") == read
    names = ", ".join(f"{source}/{name}" for name in left)
    expected = f"{len(left)} not read, names of no known kind of text: {names}"
    assert report.problems.left_out.lines() == [expected]
    run(tmp_path / "named", source / "c.jsonl", kind="text")
    assert documents(tmp_path / "named" / "train") == [jsonl(["c"]).decode()]


def test_missing_and_unknown_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        run(tmp_path / "out", tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"\*\.jsonl: no file matches"):
        run(tmp_path / "out", tmp_path / "*.jsonl")
    (tmp_path / "a.dat").write_text("text")
    with pytest.raises(DataError, match=r"a\.dat: its name does not say .* --format"):
        run(tmp_path / "out", tmp_path / "a.dat")
    run(tmp_path / "out", tmp_path / "a.dat", kind="text")
    assert documents(tmp_path / "out" / "train") == ["text"]


def test_input_without_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"no documents in .*a\.jsonl"):
        run(tmp_path / "out", tmp_path / "a.jsonl")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_options_choose_key_length_and_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a", "bb", "ccc"], key="content"))
    encode = {"text_key": "content", "min_chars": 2, "append_eod": False}
    report = run(tmp_path / "out", tmp_path / "a.jsonl", encode=encode)
    stream = TokenStream([f"{tmp_path}/out/train"])
    assert TOKENIZER.decode(stream.read(0, len(stream))) == "bbccc"
    assert report.manifest.counts["too_short"] == 1


def test_a_text_key_for_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="--text-key content is for JSON Lines and tables"):
        run(tmp_path / "out", tmp_path / "a.txt", encode={"text_key": "content"})
    (tmp_path / "b.jsonl").write_bytes(jsonl(["line"], key="content"))
    run(tmp_path / "out", tmp_path, encode={"text_key": "content"})
    assert documents(tmp_path / "out" / "train") == ["text", "line"]


def test_the_document_split_keeps_copies_together_and_ignores_order(tmp_path: Path) -> None:
    texts = many_texts()
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts + texts[:100]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts[::-1]))
    run(tmp_path / "a", tmp_path / "a.jsonl", validation_fraction=0.2)
    run(tmp_path / "b", tmp_path / "b.jsonl", validation_fraction=0.2)
    train, validation = (documents(tmp_path / "a" / split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts + texts[:100])
    assert not set(train) & set(validation)
    assert set(validation) == set(documents(tmp_path / "b" / "validation"))
    # A binomial share of 3000 documents: 5 standard deviations.
    assert abs(len(set(validation)) / 3000 - 0.2) < 5 * np.sqrt(0.16 / 3000)


def test_the_token_split_cuts_the_stream_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(many_texts(50)))
    run(tmp_path / "whole", tmp_path / "a.jsonl")
    run(tmp_path / "cut", tmp_path / "a.jsonl", split_tokens=0.8)
    whole, head, tail = (
        Shard(tmp_path / name).tokens.tolist()
        for name in ("whole/train", "cut/train", "cut/validation")
    )
    assert head + tail == whole
    assert len(head) == int(0.8 * len(whole))
    assert Shard(tmp_path / "cut/train").num_documents == 41 or head[-1] != 50256


def test_a_validation_input_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(many_texts(200)))
    (tmp_path / "held_out.txt").write_text("held out")
    run(
        tmp_path / "out",
        tmp_path / "train.jsonl",
        validation=(str(tmp_path / "held_out.txt"),),
    )
    assert documents(tmp_path / "out" / "train") == many_texts(200)
    assert documents(tmp_path / "out" / "validation") == ["held out"]


@pytest.mark.parametrize(
    ("kind", "train", "validation"),
    [(None, "in", "in/a.txt"), (None, "in/*", "link.txt"), ("gutenberg", "in/a.txt", "in")],
)
def test_what_validates_is_not_trained_on_too(
    tmp_path: Path, kind: str | None, train: str, validation: str
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "in" / "a.txt")
    with pytest.raises(DataError, match=r"/(link|a)\.txt is among the inputs of both splits"):
        run(
            tmp_path / "out",
            tmp_path / train,
            kind=kind,
            validation=(str(tmp_path / validation),),
        )
    assert not (tmp_path / "out").exists()


def test_repeated_documents_are_dropped_after_the_first(tmp_path: Path) -> None:
    texts = many_texts(1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl([*texts, "x", "x", *texts[:700], "y"]))
    for shards in (1, 3):
        output = tmp_path / f"out{shards}"
        report = run(output, tmp_path / "a.jsonl", deduplicate=True, shards=shards)
        assert documents(output / "train") == [*texts, "x", "y"]
        assert report.manifest.counts["duplicates"] == 701


@pytest.mark.parametrize("deduplicate", [False, True])
def test_an_interrupted_run_keeps_finished_shards_and_redoes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deduplicate: bool
) -> None:
    texts = many_texts(2000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts + texts[:500]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(["bad"] * 3) + b"bad\n")
    options: dict[str, Any] = {
        "shards": 4,
        "deduplicate": deduplicate,
        "on_bad_input": "skip",
        "validation_fraction": 0.1,
    }
    inputs = tmp_path / "b.jsonl", tmp_path / "a.jsonl"
    run(tmp_path / "expected", *inputs, **options)
    finish, calls = ShardWriter.finish, iter(range(100))

    def finish_some(writer: ShardWriter, *arguments: Any) -> Any:
        if next(calls) == 5:  # the validation shard of the third part
            raise KeyboardInterrupt
        return finish(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "finish", finish_some)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", *inputs, **options)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(DataError, match="shards are there"):
        resolve_prefixes([f"{tmp_path}/out/train"])
    kept = tmp_path / "out" / "train-00001-of-00004.bin"
    before = kept.stat().st_ino
    report = run(tmp_path / "out", *inputs, **options)
    assert kept.stat().st_ino == before
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert report.problems.count == report.manifest.counts["bad_inputs"] == 1
    assert "line 4: not JSON" in report.problems.summary()


def test_a_complete_corpus_is_left_alone_and_another_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(many_texts(500)))
    output = tmp_path / "out"
    run(output, path, shards=4)
    before = {file: file.stat().st_ino for file in output.iterdir()}
    assert run(output, path, shards=4).meter.counts.documents == 0
    assert {file: file.stat().st_ino for file in output.iterdir()} == before
    progress = output / ".progress"  # as left by a kill right after the manifest was published
    progress.mkdir()
    (progress / "plan.json").write_text("{}")
    assert run(output, path, shards=4).meter.counts.documents == 0
    assert not progress.exists()
    with pytest.raises(DataError, match="shards of other inputs or options"):
        run(output, path)
    run(output, path, overwrite=True)
    assert sorted(files_of(output)) == ["manifest.json", "train.bin", "train.idx"]
    (output / "train.bin").unlink()
    run(output, path)  # a lost shard is made again
    assert documents(output / "train") == many_texts(500)


@pytest.mark.parametrize(
    ("bad", "options"),
    [
        (b"bad\n", {}),
        (b"bad\n", {"shuffle_seed": 1}),
        (b"bad\n", {"split_tokens": 0.5}),
        (b"bad\n", {"on_bad_input": "skip"}),
        (b"", {}),
    ],
    ids=["order kept", "shuffled", "cut", "nothing left", "empty"],
)
def test_input_of_which_nothing_becomes_a_shard_overwrites_no_corpus(
    tmp_path: Path, bad: bytes, options: dict[str, Any]
) -> None:
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(jsonl(TEXTS))
    run(output, path)
    before = files_of(output)
    path.write_bytes(bad)
    with pytest.raises(DataError, match="not JSON" if bad else "no documents"):
        run(output, path, overwrite=True, **options)
    assert files_of(output) == before


@pytest.mark.parametrize("case", ["bad validation", "no documents", "full disk", "full disk, cut"])
def test_a_corpus_is_overwritten_by_what_can_take_its_place_alone(
    tmp_path: Path, case: str
) -> None:
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(jsonl(TEXTS))
    run(output, path, shards=2)
    before = files_of(output)
    options: dict[str, Any] = {"shuffle_seed": 1}
    if case == "bad validation":
        (tmp_path / "bad.jsonl").write_bytes(b"bad\n")
        options |= {"validation": (str(tmp_path / "bad.jsonl"),)}
    elif case == "no documents":
        options |= {"shards": 2, "encode": {"min_chars": 1000}}
    else:
        (output / "train.bin.tmp").symlink_to("/dev/full")
        options = options if case == "full disk" else {"split_tokens": 0.5}
    with pytest.raises(DataError, match=r"not JSON|no documents|No space left"):
        run(output, path, overwrite=True, **options)
    shutil.rmtree(output / ".progress", ignore_errors=True)  # to go on from
    assert files_of(output) == before


def test_shards_whose_manifest_is_damaged_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # a tokenizer that lies beside them
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(jsonl(TEXTS))
    save_tokenizer(trained_tokenizer(), tmp_path)
    own = {"vocabulary": str(tmp_path)}
    run(output, path, encode=dict(own))
    expected = (output / "manifest.json").read_bytes()
    (output / "manifest.json").write_bytes(expected[:100])
    (output / "other.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"is damaged: .*make the shards again with --overwrite"):
        run(output, path, encode=dict(own))
    with pytest.raises(DataError, match="holds a tokenizer that the shards would not be made with"):
        run(output, path, overwrite=True)  # whose it is nobody can tell
    assert (output / "manifest.json").read_bytes() == expected[:100]
    run(output, path, encode=dict(own), overwrite=True)
    assert (output / "manifest.json").read_bytes() == expected
    assert (output / "other.bin").read_bytes() == b"mine"


def test_another_program_s_manifest_is_not_overwritten(tmp_path: Path) -> None:
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(jsonl(TEXTS))
    output.mkdir()
    (output / "manifest.json").write_bytes(b'{"version": 2}')
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"is not a manifest of .*in another folder$"):
            run(output, path, overwrite=overwrite)
    assert files_of(output) == {"manifest.json": b'{"version": 2}'}


def test_a_kill_while_a_corpus_is_overwritten_leaves_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever removal it falls; the same command then goes on."""
    path, output, unlink = tmp_path / "a.jsonl", tmp_path / "out", Path.unlink
    for removals in range(3):
        path.write_bytes(jsonl(["old"] * 50))
        run(output, path, overwrite=True)
        path.write_bytes(jsonl(["new"] * 50))
        left = [removals]

        def kill(file: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            if file.parent == output and file.name != ".lock":
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            unlink(file, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", kill)
            with pytest.raises(KeyboardInterrupt):
                run(output, path, shards=2, overwrite=True)
        assert (output / "manifest.json").exists()
        assert (output / "train.idx").exists() == (removals == 0)
        run(output, path, shards=2, overwrite=True)
        assert not (output / "train.idx").exists()


def test_an_unfinished_run_of_other_options_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(many_texts()) + b"bad\n")
    with pytest.raises(DataError, match="line 3001: not JSON"):
        run(tmp_path / "out", path, shards=3)
    assert (tmp_path / "out" / "train-00000-of-00003.idx").exists()
    with pytest.raises(DataError, match="unfinished run of other inputs or options"):
        run(tmp_path / "out", path, on_bad_input="skip")
    run(tmp_path / "out", path, on_bad_input="skip", overwrite=True)
    assert sorted(files_of(tmp_path / "out")) == ["manifest.json", "train.bin", "train.idx"]
    assert documents(tmp_path / "out" / "train") == many_texts()


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "out").mkdir()
    with (
        locked_folder(tmp_path / "out"),
        pytest.raises(DataError, match="is being written by another run"),
    ):
        run(tmp_path / "out", tmp_path / "a.jsonl")


def test_a_full_disk_names_shard_and_input_and_publishes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(many_texts()))
    output = tmp_path / "out"
    output.mkdir()
    (output / "train.bin.tmp").symlink_to("/dev/full")
    message = rf"cannot write {output}/train\.bin: No space left on device .*{path}, bytes"
    with pytest.raises(DataError, match=message):
        run(output, path)
    assert not list(output.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.1, "split_tokens": 0.8}, "exclude each other"),
        ({"validation_fraction": 1.5}, r"is not in \[0, 1\)"),
        ({"split_tokens": 1.0}, "not between 0 and 1"),
        ({"split_tokens": 0.8, "shards": 2}, "one shard a split"),
        ({"split_tokens": 0.8, "shuffle_seed": 1}, "--shuffle-documents would mix"),
        ({"shards": 0}, "--shards must be from 1 to 99,999, not 0"),
        ({"shards": 2**31}, "--shards must be from 1 to 99,999, not 2,147,483,648"),
        ({"workers": 0}, "--workers must be from 1"),
        ({"workers": 2**63}, "--workers must be from 1"),
    ],
)
def test_contradicting_options_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(tmp_path / "out", tmp_path / "a.jsonl", **options)


def test_the_manifest_tells_changed_shards(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    report = run(tmp_path / "out", tmp_path / "a.jsonl")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == report.manifest
    assert manifest.tokenizer["fingerprint"] == TOKENIZER.fingerprint
    manifest.verify(tmp_path / "out")
    tokens = tmp_path / "out" / "train.bin"
    content = bytearray(tokens.read_bytes())
    content[3] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.bin has changed"):
        manifest.verify(tmp_path / "out")
    with (tmp_path / "out" / "manifest.json").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path / "out")


class _Fatal:
    """Ends the process that receives it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_a_dead_worker_ends_the_run_with_a_message() -> None:
    jobs = [Job(0, 0, Damage("a", "b")), Job(0, 0, _Fatal())]  # type: ignore[arg-type]
    with (
        EncoderPool(EncodeOptions(), workers=2) as pool,
        pytest.raises(DataError, match="a worker process died"),
    ):
        list(pool.map(jobs))


_SECOND_WORKER_REFUSED = """
import errno, os
from megaegpt.data.preprocess.encode import EncodeOptions
from megaegpt.data.preprocess.jobs import Job
from megaegpt.data.preprocess.pool import EncoderPool
from megaegpt.errors import exits_cleanly
fork, forks = os.fork, []

def limited():
    forks.append(0)
    if len(forks) > 1:
        raise OSError(errno.EMFILE, "Too many open files")
    return fork()

@exits_cleanly
def main():
    with EncoderPool(EncodeOptions(), workers=2) as pool:
        list(pool.map([Job(0, 0, None)]))

os.fork = limited
main()
"""


def test_a_worker_that_the_system_refuses_ends_the_run_with_a_message() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SECOND_WORKER_REFUSED],
        capture_output=True,
        text=True,
        timeout=600,  # it would wait for the first worker for ever
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ulimit -n" in done.stderr


def test_war_and_peace_has_the_known_number_of_tokens(data_dir: Path, tmp_path: Path) -> None:
    book = (data_dir / "books" / "war_and_peace.txt").read_text(encoding="utf-8-sig")
    (tmp_path / "wap.txt").write_text(cut_wrapper(book, "wap"), encoding="utf-8")
    run(tmp_path / "out", tmp_path / "wap.txt", split_tokens=0.8)
    assert len(TokenStream([f"{tmp_path}/out/train"])) == 679_590
    assert len(TokenStream([f"{tmp_path}/out/validation"])) == 169_898


def test_capitals_in_names_change_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "A.TXT").write_bytes(b"one")
    (source / "B.JsonL").write_bytes(jsonl(["two"]))
    (source / "C.JSONL.GZ").write_bytes(gzip.compress(jsonl(["three"])))
    (source / "d.jsonl.Zst").write_bytes(zstandard.compress(jsonl(["four"])))
    run(tmp_path / "out", source)
    assert documents(tmp_path / "out" / "train") == ["one", "two", "three", "four"]
    run(tmp_path / "named", source / "C.JSONL.GZ", source / "A.TXT")
    assert documents(tmp_path / "named" / "train") == ["three", "one"]


def test_what_a_folder_has_beside_the_input_is_told(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deeper").mkdir(parents=True)
    (source / "a.txt").write_text("one")
    (source / "notes.pdf").write_bytes(b"%PDF")
    (source / "deeper" / "part.parquet").write_bytes(b"PAR1")
    (source / ".DS_Store").write_bytes(b"")
    (source / "again").symlink_to(source / "deeper")
    (source / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.txt")
    for _ in range(2):  # of a complete corpus too
        report = run(tmp_path / "out", source)
        assert sorted(report.problems.left_out.lines()) == [
            f"1 not read, hidden: {source}/.DS_Store",
            f"1 not read, links to folders: {source}/again",
            f"1 not read, links to nothing: {source}/gone",
            f"1 not read, names of no known kind of text: {source}/notes.pdf",
            f"1 not read, parquet (--format parquet reads it): {source}/deeper/part.parquet",
            f"1 not read, pipes or devices: {source}/pipe.txt",
        ]
    (source / "a.txt").unlink()
    with pytest.raises(DataError, match=r"no files ending in .*; 1 not read, hidden: .*DS_Store"):
        run(tmp_path / "none", source)


@pytest.mark.parametrize("place", ["shards", "."])
@pytest.mark.parametrize("pattern", ["", "**/*.json*"])
def test_shards_below_the_input_are_no_input(tmp_path: Path, place: str, pattern: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    run(tmp_path / place, tmp_path / pattern)
    before = files_of(tmp_path / place) if place == "shards" else None
    assert run(tmp_path / place, tmp_path / pattern).meter.counts.documents == 0
    run(tmp_path / place, tmp_path / pattern, overwrite=True)
    assert documents(tmp_path / place / "train") == TEXTS
    assert before is None or files_of(tmp_path / place) == before


def test_what_a_killed_run_leaves_below_the_input_is_not_told_as_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    finish, calls = ShardWriter.finish, iter(range(100))

    def finish_one(writer: ShardWriter, *arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return finish(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "finish", finish_one)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", tmp_path, shards=2)
    monkeypatch.setattr(ShardWriter, "finish", finish)
    assert (tmp_path / "out" / ".progress").exists()
    (tmp_path / "out" / ".lock").touch()
    report = run(tmp_path / "out", tmp_path, shards=2)
    assert documents(tmp_path / "out" / "train") == TEXTS
    assert report.problems.left_out.lines() == []


@pytest.mark.parametrize("place", ["shards", "."])
def test_the_tokenizer_beside_shards_is_no_input(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # it is another one than GPT-2's
    for name in ("vocabulary", "in"):
        (tmp_path / name).mkdir()
    save_tokenizer(trained_tokenizer(), tmp_path / "vocabulary")
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(TEXTS))
    vocabulary, shards = {"vocabulary": str(tmp_path / "vocabulary")}, tmp_path / "in" / place
    run(shards, tmp_path / "in", encode=dict(vocabulary))
    assert (shards / "tokenizer" / "tokenizer.json").exists()
    assert run(shards, tmp_path / "in", encode=dict(vocabulary)).meter.counts.documents == 0
    report = run(tmp_path / "other", tmp_path / "in", encode=dict(vocabulary))
    assert report.manifest.counts["documents"] == len(TEXTS)


@pytest.mark.parametrize("pattern", ["", "**/*.*"])
def test_shards_of_other_sets_are_no_input_either(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    run(tmp_path / "earlier", tmp_path / "a.jsonl")
    report = run(tmp_path / "out", tmp_path / pattern)
    assert documents(tmp_path / "out" / "train") == TEXTS
    (line,) = report.problems.left_out.lines()
    assert line.startswith("3 not read, shards of tokens and their manifests: ")
    with pytest.raises(DataError, match=r"no documents in .*train\.bin; 1 not read, shards of tok"):
        run(tmp_path / "other", tmp_path / "earlier" / "train.bin", kind="text")


def test_a_folder_is_left_only_where_something_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    for place in ("out", "deep/out"):
        with pytest.raises(DataError, match="no text column"):
            run(tmp_path / place, tmp_path / "a.jsonl")
    (tmp_path / "kept").mkdir()
    with pytest.raises(DataError, match="no text column"):
        run(tmp_path / "kept", tmp_path / "a.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "kept"]


def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("A text.")
    report = run(tmp_path / "out", tmp_path / name)
    assert Manifest.load(tmp_path / "out") == report.manifest
    assert report.manifest.plan["inputs"]["train"][0]["path"] == str(tmp_path / name)
    (tmp_path / "out" / "manifest.json").read_bytes().decode("utf-8")
    assert run(tmp_path / "out", tmp_path / name).meter.counts.documents == 0


def test_where_everything_is_bad_the_reason_is_given_and_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    with pytest.raises(DataError, match=r"no documents .* 4 bad .*line 1: no text column 'body'"):
        run(tmp_path / "out", path, encode={"text_key": "body"}, on_bad_input="skip")
    with pytest.raises(DataError, match=r"no documents .* 4 have fewer than 100 characters"):
        run(tmp_path / "out", path, encode={"min_chars": 100})
    run(tmp_path / "out", path)  # other options than those that failed
    assert documents(tmp_path / "out" / "train") == TEXTS


def test_after_a_killed_run_of_other_options_foreign_shards_are_still_somebody_s(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": 1}\n')
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out" / "train") as writer:
        writer.add_document(np.arange(3, dtype=np.uint16))
        writer.finish()
    (tmp_path / "out" / ".progress").mkdir()
    (tmp_path / "out" / ".progress" / "plan.json").write_text("{}")
    with pytest.raises(DataError, match=r"train\.idx exists already and would be replaced"):
        run(tmp_path / "out", tmp_path / "a.jsonl")
    assert Shard(tmp_path / "out" / "train").document(0).tolist() == [0, 1, 2]


def test_what_a_glob_matches_below_a_folder_that_it_matches_is_read_once(tmp_path: Path) -> None:
    for name in ("in/a/deep/x.jsonl", "in/y.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    for pattern in ("in/**", "in/*", "in/**/*.jsonl"):
        run(tmp_path / "out", tmp_path / pattern, overwrite=True)
        found = documents(tmp_path / "out" / "train")
        assert sorted(found) == ["in/a/deep/x.jsonl", "in/y.jsonl"], pattern


def test_a_manifest_of_very_many_files_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MOST_LISTED", 2)
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.txt").write_text("A text.")
    report = run(tmp_path / "out", tmp_path / "in")
    (described,) = report.manifest.plan["inputs"]["train"]
    assert described.keys() == {"files", "size", "sha256"}
    assert run(tmp_path / "out", tmp_path / "in").meter.counts.documents == 0
    (tmp_path / "in" / "2.txt").write_text("B text.")
    with pytest.raises(DataError, match="shards of other inputs"):
        run(tmp_path / "out", tmp_path / "in")


def test_a_tokenizer_beside_the_output_is_neither_lost_nor_taken_for_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # two tokenizers
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    own = tmp_path / "out" / "tokenizer"
    own.mkdir(parents=True)
    save_tokenizer(trained_tokenizer(), own)
    (own / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"out/tokenizer holds a tokenizer that the shards would"):
        run(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True)
    run(tmp_path / "out", tmp_path / "a.jsonl", encode={"vocabulary": str(own)})
    assert (own / "notes.txt").read_text() == "mine"


def test_after_a_failed_overwrite_by_another_tokenizer_the_folder_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer of the shards that are gone is nobody's."""
    monkeypatch.undo()  # two tokenizers
    path, output = tmp_path / "a.jsonl", tmp_path / "out"
    save_tokenizer(trained_tokenizer(), tmp_path)
    path.write_bytes(jsonl(TEXTS))
    run(output, path, encode={"vocabulary": str(tmp_path)})
    assert (output / "tokenizer").exists()
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl(many_texts()) + b"bad\n")  # which is met behind the first shard
    with pytest.raises(DataError, match="line 3001: not JSON"):
        run(output, bad, shards=3, overwrite=True)
    assert not (output / "tokenizer").exists()
    run(output, path, overwrite=True)
    assert sorted(files_of(output)) == ["manifest.json", "train.bin", "train.idx"]
    run(output, path, encode={"vocabulary": str(tmp_path)}, overwrite=True)
    own = str(output / "tokenizer")
    with pytest.raises(DataError, match="line 3001: not JSON"):
        run(output, bad, shards=3, encode={"vocabulary": own}, overwrite=True)
    assert (output / "tokenizer" / "tokenizer.json").exists()


def test_shards_that_no_manifest_lists_are_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out" / "train") as writer:
        writer.add_document(np.array([1, 2]))
        writer.finish()
    before = files_of(tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.idx exists already .*--overwrite"):
        run(tmp_path / "out", tmp_path / "a.jsonl")
    assert files_of(tmp_path / "out") == before
    run(tmp_path / "out", tmp_path / "a.jsonl", overwrite=True)
    assert documents(tmp_path / "out" / "train") == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_a_git_lfs_pointer_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS_POINTER + b"v1\noid sha256:12\nsize 34\n")
    with pytest.raises(DataError, match=rf"{name}: a Git LFS pointer, .*git lfs pull"):
        run(tmp_path / "out", tmp_path / name)


def test_parquet_pipes_and_devices_are_told_how_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is read with --format parquet"):
        run(tmp_path / "out", tmp_path / "a.parquet")
    for kind in (None, "text", "jsonl", "wikipedia"):
        with pytest.raises(DataError, match="/dev/zero is a pipe or a device"):
            run(tmp_path / "out", Path("/dev/zero"), kind=kind)


@pytest.mark.parametrize(
    "content", [b"null", b"[]", b"5", b'{"name": 1}', b'{"counts": null}', b"[" * 100_000, b"\xff"]
)
def test_a_damaged_record_of_progress_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(many_texts()) + b"bad\n")
    with pytest.raises(DataError, match="line 3001"):
        run(tmp_path / "out", tmp_path / "a.jsonl", shards=3)
    progress = tmp_path / "out" / ".progress"
    record = progress / "cut-train-00000.json"
    assert record.exists()
    record.write_bytes(content)
    with pytest.raises(DataError, match=r"cut-train-00000\.json is damaged .*: remove"):
        run(tmp_path / "out", tmp_path / "a.jsonl", shards=3)
    (progress / "plan.json").write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json is damaged|holds an unfinished run of other"):
        run(tmp_path / "out", tmp_path / "a.jsonl", shards=3)
