"""Values of command lines: taken in their range, refused outside with what is allowed."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaegpt.arguments import ArgumentParser, input_name, integer, number, path, seed

_POSITIVE = integer(1)
_SHARE = number(above=0, most=1)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (_POSITIVE, "1", 1),
        (_POSITIVE, "2147483647", 2**31 - 1),
        (integer(-1), "-1", -1),
        (seed, "0", 0),
        (seed, "9223372036854775807", 2**63 - 1),
        (_SHARE, "1", 1.0),
        (_SHARE, "5e-1", 0.5),
        (number(), "-3.5", -3.5),
        (path, "a b", Path("a b")),
        (input_name, "-", "-"),
    ],
)
def test_values_in_range_are_taken(parse: Callable[[str], Any], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts", "told"),
    [
        (
            _POSITIVE,
            ("0", "-1", "1.0", "1_0", "", "x", "२", "9" * 5000),
            "an integer of at least 1,",
        ),
        (integer(2, 8), ("1", "9"), "an integer from 2 to 8,"),
        (seed, ("-1", str(2**63), str(2**64)), "an integer from 0 to"),
        (_SHARE, ("0", "1.1", "nan", "inf", "-inf", "x", ""), "a number above 0 and at most 1,"),
        (number(), ("nan", "1e999"), "a finite number, not"),
        (path, ("", "a\0b"), "the name of a file or folder"),
        (input_name, ("", "a\0b"), "the name of a file or folder"),
    ],
)
def test_others_are_refused_with_what_is_allowed(
    parse: Callable[[str], Any], texts: tuple[str, ...], told: str
) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=r"^must be ") as raised:
            parse(text)
        assert told in str(raised.value)
        assert len(str(raised.value)) < 120


def test_two_hyphens_are_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--seed", type=integer(0))
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed=--"])
    assert "--seed needs a value, not '--'" in capsys.readouterr().err
    assert parser.parse_args(["--seed=3"]).seed == 3


@pytest.mark.parametrize(
    "line",
    [
        ["tools.preprocess", "a.txt", "--output="],
        ["tools.train_tokenizer", "-", "--output=a", "--vocab-size=300"],
        ["tools.prepare_data", "text", "--output="],
        ["tools.generate", "--checkpoint=", "--prompt=a"],
        ["tools.evaluate", "--checkpoint=", "--text=a"],
        ["tools.convert", "masters", "", "out"],
        ["tools.generate", "--checkpoint=a", "--prompt=a", "--num-samples=0"],
        ["tools.evaluate", "--checkpoint=a", "--text=a", "--limit=1"],
        ["tools.evaluate", "--checkpoint=a", f"--text={__file__}", f"--json={__file__}"],
        ["tools.preprocess", "a.txt", "--output=a", "--min-chars=-1"],
        ["tools.benchmark", "data", "--threads=1"],
        ["tools.evaluate", "--checkpoint=a", "--text=a", "--tensor-parallel-size=0"],
    ],
    ids=lambda line: " ".join(line),
)
def test_programs_refuse_empty_names_senseless_counts_and_options_of_no_use(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(line[0]).main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize(
    "line",
    [
        ["tools.preprocess", "", "--output=a"],
        ["tools.preprocess", "a.txt", "--output=a", "--validation="],
        ["tools.train_tokenizer", "", "--output=a", "--vocab-size=300"],
        ["tools.evaluate", "--checkpoint=a", "--text="],
    ],
    ids=lambda line: " ".join(line),
)
def test_an_input_without_a_name_is_not_the_working_directory(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit):
        importlib.import_module(line[0]).main()
    assert "must be the name of a file or folder" in capsys.readouterr().err


def test_a_path_begins_at_home_where_a_shell_leaves_that_to_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("~/shards") == tmp_path / "shards"
    assert path("~") == tmp_path
    for name in ("a~/b", "~backup", "$HOME", "./~"):
        assert str(path(name)) == name.removeprefix("./")
