"""What ``benchmark.py gpu`` finds on the way: checks, problems, and the page that shows them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from megaegpt.files import write_whole
from megaegpt.text_tables import format_table
from tools.benchmarks.common import machine

Check = tuple[str, str, str, bool]
"""What was looked at, what was found, what is expected, and whether that is so."""

Self = TypeVar("Self", bound="Checklist")


class Checklist:
    """Checks in the order in which they were made, and the problems among them.

    Args:
        title: of the page.
        on_gpu: without a GPU the page says that its sizes are tiny.
    """

    def __init__(self, title: str, on_gpu: bool) -> None:
        self.title = title
        self.on_gpu = on_gpu
        self.checks: list[Check] = []
        self.problems: list[str] = []
        self.rows: list[tuple[str, ...]] = []
        """Of a table beside the checks."""

    def attempt(self: Self, name: str, part: Callable[[Self], None]) -> None:
        """Run a part; what goes wrong in it is a problem, and not the end."""
        try:
            part(self)
        except Exception as error:
            traceback.print_exc()
            self.problems.append(f"{name}: {type(error).__name__}: {error}")

    def note(self, what: str, found: str, expected: str, holds: bool) -> None:
        """Note a check, and the problem if it does not hold."""
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {found} (expected: {expected})", flush=True)
        self.checks.append((what, found, expected, holds))
        if not holds:
            self.problems.append(f"{what} is {found}, not {expected}")

    def tables(self) -> dict[str, list[tuple[str, ...]]]:
        """By title, headings first; those that have rows."""
        verdicts = [(a, b, c, "yes" if holds else "NO") for a, b, c, holds in self.checks]
        return {"Checks": [("", "found", "expected", "holds"), *verdicts]} if verdicts else {}

    def page(self, minutes: float) -> str:
        """All of it, as Markdown."""
        facts = ", ".join(f"{k} {v}" for k, v in machine().items() if v not in (None, "absent"))
        lines = [f"# {self.title}", "", f"{facts}. {minutes:.1f} minutes.", ""]
        if not self.on_gpu:
            lines += ["There was no GPU: sizes are tiny, and say nothing about speed.", ""]
        for title, (heading, *rows) in self.tables().items():
            lines += [f"## {title}", "", *map(_line, [heading, ("---",) * len(heading), *rows]), ""]
        if self.problems:
            lines += ["## Problems", "", *(f"- {problem}" for problem in self.problems), ""]
        return "\n".join(lines)

    def conclude(self, minutes: float, page: Path | None) -> None:
        """Print the tables, and write the page where one is wanted."""
        print()
        for rows in self.tables().values():
            print(format_table(rows))
            print()
        if not self.on_gpu:
            print("there is no GPU: these are tiny sizes on the CPU, and say nothing about speed")
        print(f"{minutes:.1f} minutes")
        if page is not None:
            write_whole(page, self.page(minutes).encode())
            print(f"wrote {page}")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
