"""Tables and numbers as text, for terminals."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Aligned columns, two blanks apart, with a line under the heading.

    Args:
        rows: the heading and the rows; where one is shorter than the longest, its end is blank.
        names: how many columns from the left hold names, which are aligned to the left; the others
            hold numbers, aligned to the right.

    Example:
        >>> print(format_table([("run", "loss"), ("gpt", "3.1"), ("egpt", "12.9")]))
        run   loss
        ----  ----
        gpt    3.1
        egpt  12.9
    """
    longest = max(map(len, rows))
    padded = [[*row, *[""] * (longest - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < names else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in padded
    )


def short_count(number: float) -> str:
    """1234567 -> 1.2M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def percentage(share: float | None) -> str:
    """0.4567 -> 45.7%, None -> n/a"""
    return "n/a" if share is None else f"{share:.1%}"


def short_time(seconds: float) -> str:
    """3700 -> 1h02m, 95 -> 1m35s"""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole}s"
