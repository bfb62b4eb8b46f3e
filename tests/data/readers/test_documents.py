"""The policy for bad input."""

from __future__ import annotations

import pytest

from megaegpt.data.readers.documents import Document, LeftOut, Problems
from megaegpt.errors import DataError


def test_fail_names_the_place_and_the_way_out() -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl, line 3: not JSON .*--on-bad-input skip"):
        Problems("fail").report("a.jsonl, line 3", "not JSON")


def test_skip_counts_all_and_shows_a_few() -> None:
    problems = Problems("skip")
    assert problems.summary() == ""
    for line in range(1, 9):
        problems.report(f"a.jsonl, line {line}", "not JSON")
    assert problems.count == 8
    assert problems.summary().splitlines()[0] == "8 bad inputs skipped"
    assert "a.jsonl, line 1: not JSON" in problems.summary()
    assert problems.summary().splitlines()[-1] == "  ... and 3 more"


def test_merged_counts_add_up() -> None:
    problems = Problems("skip")
    problems.report("a", "x")
    problems.merge(10, ["b: y"])
    assert problems.count == 11
    assert problems.examples == ["a: x", "b: y"]


def test_a_document_knows_where_it_is() -> None:
    assert Document("t", "a.txt", "line 2").where == "a.txt, line 2"
    assert Document("t", "a.txt", "").where == "a.txt"


def test_what_is_left_out_is_counted_by_its_reason() -> None:
    left_out = LeftOut()
    assert left_out.lines() == []
    for number in range(7):
        left_out.add(f"{number}.pdf", "no text")
    left_out.add(".git", "hidden")
    assert left_out.lines() == [
        "7 not read, no text: 0.pdf, 1.pdf, 2.pdf, 3.pdf, 4.pdf and 2 more",
        "1 not read, hidden: .git",
    ]
