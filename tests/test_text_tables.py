"""Tables as text."""

from __future__ import annotations

import doctest

from megaegpt import text_tables


def test_the_example() -> None:
    assert doctest.testmod(text_tables) == (0, 1)  # failed, attempted


def test_a_share_that_is_not_known_is_not_a_number() -> None:
    assert [text_tables.percentage(share) for share in (0.4567, None)] == ["45.7%", "n/a"]


def test_short_rows_end_blank_and_names_are_at_the_left() -> None:
    rows = [("run", "kind", "1", "2"), ("long name", "gpt", "0.5"), ("b", "deepgpt", "1.25", "7")]
    assert text_tables.format_table(rows, names=2).splitlines() == [
        "run        kind        1  2",
        "---------  -------  ----  -",
        "long name  gpt       0.5",
        "b          deepgpt  1.25  7",
    ]
