"""What YAML in a configuration means, and what is refused before it costs time or memory."""

from __future__ import annotations

import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megaegpt.config.yaml_text import parse_yaml, read_yaml, write_yaml
from megaegpt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("010", 10),
        ("-08", -8),
        ("0o17", 15),
        ("0x1F", 31),
        ("262_144", 262144),
        ("1:30", "1:30"),
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("n", "n"),
        ("2026-01-01", "2026-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'010'", "010"),
        ("[1, {a: 02}]", [1, {"a": 2}]),
    ],
)
def test_a_scalar_means_what_people_write(text: str, meaning: Any) -> None:
    value, _ = parse_yaml(text)
    assert value == meaning
    assert type(value) is type(meaning)


@pytest.mark.parametrize(
    "text",
    ["010", "0o17", "1:30", "yes", "No", "1e5", "1_000", "~", "", "<<", "=", "2026-01-01", "“É”\n"],
)
def test_a_text_that_looks_like_something_else_is_written_so_that_it_stays_a_text(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(write_yaml({"prompt": text}), encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == ({"prompt": text}, [])


def test_aliases_and_merges_are_kept_where_they_are_few() -> None:
    value, problems = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert value == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}
    assert not problems


def test_a_key_given_twice_is_named_with_its_section_and_line() -> None:
    _, problems = parse_yaml("a:\n  b: {c: 1, c: 2}\nd: 1\nd: 2\n")
    assert [problem.message for problem in problems] == [
        "line 2: a.b.c is given twice",
        "line 4: d is given twice",
    ]


def _laughs(item: str) -> str:
    """Nine levels of aliases, each of nine of the level below: 9**9 values when written out."""
    levels = "abcdefghij"
    lines = [f"{levels[0]}: &{levels[0]} {{x: 1}}"]
    for below, level in itertools.pairwise(levels):
        lines.append(f"{level}: &{level} " + item.format(",".join([f"*{below}"] * 9)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_laughs("[{}]"), "holds more than 20,000 keys"),
        (_laughs("{{<<: [{}], y: 1}}"), "holds more than 20,000 keys"),
        ("\n".join(f"key{n}: {n}" for n in range(60_000)), "holds more than 20,000 keys"),
        ("#" * 2_000_000, "larger than 1 MiB"),
        ("[" * 100_000, "nested more than 50 levels deep"),
        ("- " * 100_000, "nested more than 50 levels deep"),
        ("a: &a [*a]", "nested more than 50 levels deep"),
        ("a: " + "1" * 5000, "not YAML: Exceeds the limit"),
        ("!" * 100_000, "could not determine a constructor"),
    ],
    ids=["laughs", "merges", "keys", "bytes", "depth", "lists", "ring", "digits", "tag"],
)
def test_what_no_configuration_is_like_is_refused_at_once_in_one_line(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert time.monotonic() - started < 20, "minutes if aliases are written out or keys are read"
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_device_that_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: this is no configuration: it is larger"):
        read_yaml(Path("/dev/zero"))


def test_a_pipe_is_refused_without_waiting_and_an_open_one_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(it is no regular file\)"):
        read_yaml(tmp_path / "run.yaml")
    reading, writing = os.pipe()  # as a shell makes for <(command)
    os.write(writing, b"a: 1")
    os.close(writing)
    assert read_yaml(Path(f"/dev/fd/{reading}"))[0] == {"a": 1}
    os.close(reading)
