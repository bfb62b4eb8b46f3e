"""tools/prepare_data.py: which text it takes, how it is cleaned, what it leaves on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

from megaegpt.config.loading import load_config
from megaegpt.data.instruction.exercises import exercises
from megaegpt.data.instruction.records import read_instructions
from megaegpt.data.readers import books
from megaegpt.data.readers.documents import Problems
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import DataError
from megaegpt.files import locked_folder
from tests.data.readers import test_openwebtext
from tests.data.readers.test_gutenberg import BODY, FOOTER, HEADER
from tools import prepare_data


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No local corpora and no network, whatever the machine."""

    def unreachable(url: str, *_: object) -> Path:
        raise DataError(f"{url}: cannot be downloaded (offline)")

    monkeypatch.delenv("MEGAEGPT_DATA", raising=False)
    monkeypatch.setattr(books, "download", unreachable)


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    prepare_data.main()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_given_file_becomes_one_clean_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "mine.txt"
    book.write_text(HEADER + BODY + FOOTER, encoding="utf-8")
    out = tmp_path / "out"
    prepare(monkeypatch, "war_and_peace", "--output", out, "--input", book, "--straight-quotes")
    [line] = lines(out / "war_and_peace.jsonl")
    assert 'hall struck, and "nobody" was there' in line["text"]
    assert line["meta"]["title"] == "War and Peace"
    assert [path.name for path in out.iterdir()] == ["war_and_peace.jsonl"]
    printed = capsys.readouterr().out
    assert "another edition" in printed
    assert printed.rstrip().endswith(str(out / "war_and_peace.jsonl"))


def test_instructions_are_what_the_shipped_configurations_of_fine_tuning_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(monkeypatch, "instructions", "--output", "data")
    assert capsys.readouterr().out == "data/instructions.jsonl\n"
    for name in ("finetune_instructions", "finetune_chat"):
        config = load_config(name)
        (file,) = config.data.instructions.train
        assert read_instructions(Path(file), Problems()) == exercises()
    with pytest.raises(SystemExit):
        prepare(monkeypatch, "instructions", "--output", "data", "--input", "x")
    assert "--input would change nothing for instructions" in capsys.readouterr().err


def test_offline_without_the_book_the_error_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        prepare(monkeypatch, "war_and_peace", "--output", tmp_path)
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "gutenberg.org" in message
    assert "--input" in message
    assert list(tmp_path.iterdir()) == []


def test_the_book_falls_back_to_the_bible_and_the_choice_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(monkeypatch, "book", "--output", tmp_path)
    assert "text: The King James Bible" in capsys.readouterr().out
    [line] = lines(tmp_path / "book.jsonl")
    assert line["text"].startswith(
        "GENESIS\n\nChapter 1\n\nIn the beginning God created the heaven and the earth.\nAnd the"
    )
    assert line["text"].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert line["text"].count("\nChapter ") == 1_189

    monkeypatch.setattr(prepare_data, "load_book", lambda *_, **__: pytest.fail("chose again"))
    prepare(monkeypatch, "book", "--output", tmp_path)
    assert "text: The King James Bible (prepared before)" in capsys.readouterr().out
    monkeypatch.undo()
    named = tmp_path / "2600-0.txt"
    named.write_text("nothing of that book")
    with pytest.raises(SystemExit):  # a file that is named is read, whatever was prepared before
        prepare(monkeypatch, "book", "--output", tmp_path, "--input", named)
    assert str(named) in capsys.readouterr().err


def test_the_bible_is_read_without_importing_its_package() -> None:
    books.king_james_bible()
    assert "bible" not in sys.modules


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "king_james_bible.jsonl"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit):
        prepare(monkeypatch, "king_james_bible", "--output", tmp_path)
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert target.read_text() == "old"


def test_a_download_with_other_words_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(url: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(HEADER + BODY + FOOTER, encoding="utf-8")
        return target

    monkeypatch.setattr(books, "download", wrong)
    with pytest.raises(DataError, match="not those of the known edition"):
        books.load_book(books.BOOKS["moby_dick"], books.Cleaning(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_the_known_words_is_kept_whatever_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "It was late when the clock in the hall struck, and “nobody” was there to hear it."
    sha256 = hashlib.sha256(words.encode()).hexdigest()
    book = books.Book("clock", "The Clock", "Ada Example", 1, "It was late", "to hear it.", sha256)
    fetched = []

    def serve(url: str, target: Path) -> Path:
        fetched.append(url)
        target.write_text((HEADER + BODY + FOOTER).replace("\n", "\r\n"), encoding="utf-8-sig")
        return target

    monkeypatch.setattr(books, "download", serve)
    for _ in range(2):  # the second time from the kept file
        document = books.load_book(book, books.Cleaning(), tmp_path)
        assert words in document.text
    assert len(fetched) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["clock.txt"]


def test_a_corpus_in_its_native_format_becomes_json_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"body": "Grüße", "id": 3}\n{oops}\n{"body": "\\ud800"}\n', encoding="utf-8")
    command = ("jsonl", "--output", tmp_path / "out", "--input", source)
    command += ("--reader-option", "text_column=body")
    with pytest.raises(SystemExit):
        prepare(monkeypatch, *command)
    assert "in.jsonl, line 2: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    prepare(monkeypatch, *command, "--on-bad-input", "skip")
    assert lines(tmp_path / "out" / "jsonl.jsonl") == [{"text": "Grüße", "meta": {"id": 3}}]
    assert "2 bad inputs skipped" in capsys.readouterr().out


def test_a_corpus_without_a_free_download_asks_for_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        prepare(monkeypatch, "cnn", "--output", tmp_path)
    assert "cnn cannot be downloaded freely: give its files by --input" in capsys.readouterr().err


def test_a_corpus_of_many_parts_is_downloaded_and_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(url: str, target: Path, progress: object) -> Path:
        page = f"Page of {url.rpartition('/')[2]}"
        part = test_openwebtext.outer(test_openwebtext.subset({"0.txt": page}))
        return test_openwebtext.write(target, part)

    monkeypatch.setattr(prepare_data, "download", serve)
    prepare(monkeypatch, "openwebtext", "--output", tmp_path)
    texts = [line["text"] for line in lines(tmp_path / "openwebtext.jsonl")]
    assert texts == [f"Page of urlsf_subset{n:02d}.tar" for n in range(21)]


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("war_and_peace", {}, 797_293),
        ("war_and_peace", {"keep_wraps": True}, 849_487),
        ("war_and_peace", {"doubled_newlines": True}, 902_163),
        ("anna_karenina", {}, 506_032),
        ("moby_dick", {}, 305_941),
    ],
)
def test_real_books_have_the_known_number_of_tokens(
    data_dir: Path, tmp_path: Path, name: str, options: dict[str, bool], tokens: int
) -> None:
    said: list[str] = []
    book = books.BOOKS[name]
    cleaning = books.Cleaning(**options)
    document = books.load_book(book, cleaning, tmp_path, local=data_dir, log=said.append)
    assert not any("another edition" in line for line in said)
    assert len(Tokenizer.load().encode(document.text)) == tokens


def test_tolstoy_is_two_books_to_train_on_and_one_to_validate(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch, "tolstoy", "--output", tmp_path, "--input", data_dir, "--doubled-newlines")
    train, validation = (
        lines(tmp_path / "tolstoy_train.jsonl"),
        lines(tmp_path / "tolstoy_validation.jsonl"),
    )
    assert [line["meta"]["title"] for line in train] == ["War and Peace", "Anna Karenina"]
    assert [line["meta"]["author"] for line in validation] == ["Herman Melville"]
    for line in train + validation:
        assert "\n\n\n" not in line["text"]  # every line end a blank line, and never more than one
        assert line["text"].count("\n") == 2 * line["text"].count("\n\n")


def test_three_books_are_not_made_of_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text("A book.")
    given = ["tolstoy", "--input", str(tmp_path / "book.txt"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prepare_data", *given])
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main()
    assert "is a folder with the three books, not one file" in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked_folder(tmp_path), pytest.raises(SystemExit):
        prepare(monkeypatch, "king_james_bible", "--output", tmp_path)
    assert "is being written by another run (process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_book_prepared_by_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (b"", b"[]\n", b"null", b"\xff", b'{"meta": {}}', b"[" * 100_000):
        (tmp_path / "book.jsonl").write_bytes(content)
        with pytest.raises(SystemExit):
            prepare(monkeypatch, "book", "--output", tmp_path)
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/book.jsonl is not what this program writes")
        assert error.count("\n") == 1


def test_a_folder_that_is_input_and_output_is_read_without_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.JSONL").write_text('{"text": "one", "meta": {"id": "\\udce9"}}\n')
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    for _ in range(2):
        prepare(monkeypatch, "jsonl", "--output", tmp_path, "--input", tmp_path)
        assert "1 not read, names of no known kind" in capsys.readouterr().out
        [line] = lines(tmp_path / "jsonl.jsonl")
        assert line == {"text": "one", "meta": {"id": "\udce9"}}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("enron", ("--keep-wraps",), "--keep-wraps would change nothing for enron: .*--reader-opt"),
        ("jsonl", ("--straight-quotes",), "--straight-quotes would change nothing for jsonl"),
        ("moby_dick", ("--reader-option", "a=b"), "--reader-option would change nothing for moby"),
        ("tolstoy", ("--on-bad-input", "skip"), "--on-bad-input would change nothing for tolstoy"),
        ("king_james_bible", ("--input", "x", "--doubled-newlines"), "--doubled-newlines, --input"),
    ],
)
def test_options_that_change_nothing_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        prepare(monkeypatch, name, "--output", tmp_path / "out", *options)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_where_everything_is_bad_the_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(SystemExit):
        prepare(
            monkeypatch, "jsonl", "--output", tmp_path / "out", "--input", tmp_path / "a.jsonl",
            "--on-bad-input", "skip",
        )  # fmt: skip
    assert "there are no documents: 1 bad input was skipped, the first" in capsys.readouterr().err
