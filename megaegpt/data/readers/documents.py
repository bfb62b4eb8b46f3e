"""The documents that every reader yields, and the treatment of input that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megaegpt.errors import DataError

BadInputPolicy = Literal["fail", "skip"]

_EXAMPLES_KEPT = 5


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str
    """The file."""
    position: str
    """The place inside the file: ``line 12``, ``row 3``, a member's name."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    share_read: float = 0.0
    """Share of the file that is read by its end, 0..1, where the place in the file is not known."""

    @property
    def where(self) -> str:
        """File and place, as an error message names them."""
        return f"{self.source}, {self.position}" if self.position else self.source


class LeftOut:
    """Files that lie among the input and are not read: how many, why, and the first names of each.

    Args:
        written: tells the files that the program itself has written, which are no input.
    """

    def __init__(self, written: Callable[[Path], bool] = lambda _: False) -> None:
        self.written = written
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, name: str, why: str) -> None:
        """A file is left out.

        Args:
            name: as it is shown; for a member of an archive with the archive's name.
            why: the reason, which files may share.
        """
        self._counts[why] = self._counts.get(why, 0) + 1
        names = self._names.setdefault(why, [])
        if len(names) < _EXAMPLES_KEPT:
            names.append(name)

    def lines(self) -> list[str]:
        """A line for each reason, with the number of files and the first names."""
        lines = []
        for why, count in self._counts.items():
            names = self._names[why]
            more = f" and {count - len(names):,} more" if count > len(names) else ""
            lines.append(f"{count:,} not read, {why}: {', '.join(names)}{more}")
        return lines


class Problems:
    """The policy for bad input, and the count of what it has let pass.

    ``fail`` raises :class:`DataError` at the first problem; ``skip`` counts all of them and keeps
    the first few for the report.

    Args:
        policy: what a problem does.
        remedy: how a user chooses ``skip``.
        left_out: told of the files of folders and archives that are not read.
    """

    def __init__(
        self,
        policy: BadInputPolicy = "fail",
        remedy: str = "--on-bad-input skip",
        left_out: LeftOut | None = None,
    ) -> None:
        self.left_out = left_out or LeftOut()
        self.policy = policy
        self.remedy = remedy
        self.count = 0
        self.examples: list[str] = []

    def report(self, where: str, what: str) -> None:
        """A piece of input is unusable and will be left out.

        Args:
            where: file and place, such as ``news.jsonl, line 12``.
            what: what is wrong with it.

        Raises:
            DataError: the policy is ``fail``.
        """
        if self.policy == "fail":
            raise DataError(f"{where}: {what} ({self.remedy} leaves such input out)")
        self.count += 1
        if len(self.examples) < _EXAMPLES_KEPT:
            self.examples.append(f"{where}: {what}")

    def merge(self, count: int, examples: list[str]) -> None:
        """Add what another part of the same run has skipped."""
        self.count += count
        self.examples = (self.examples + examples)[:_EXAMPLES_KEPT]

    def why_nothing(self) -> str:
        """Describe input that was skipped or left out in words to follow "no documents"; empty if
        there was none.
        """
        count = "1 bad input was" if self.count == 1 else f"{self.count:,} bad inputs were"
        skipped = f": {count} skipped, the first {self.examples[0]}" if self.examples else ""
        return skipped + "".join(f"; {line}" for line in self.left_out.lines())

    def summary(self) -> str:
        """One line for a count, and one for each example; empty without problems."""
        if not self.count:
            return ""
        lines = [f"{self.count} bad inputs skipped"]
        lines += [f"  {example}" for example in self.examples]
        if self.count > len(self.examples):
            lines.append(f"  ... and {self.count - len(self.examples)} more")
        return "\n".join(lines)
