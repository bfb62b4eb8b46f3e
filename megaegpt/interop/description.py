"""A model's description in another program's words: values by key, each of a known type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaegpt.errors import CheckpointError
from megaegpt.json_files import conform


class Description:
    """A model's description: its ``config.json`` or the metadata of its GGUF file."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        """``source`` begins every message."""
        self.values, self.source = values, source

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def read(
        self, key: str, kind: type, default: Any, other: str = "", *, nullable: bool = False
    ) -> Any:
        """The value of ``key``, or of the ``other`` name for it; ``default`` if there is none.

        null is a value where the default is None or ``nullable`` says so, and None then.

        Raises:
            CheckpointError: it is of another type, not finite, or the two names disagree.
        """
        names = [name for name in (key, other) if name in self.values]
        found = [self._typed(name, kind, nullable or default is None) for name in names]
        if len(found) == 2 and found[0] != found[1]:
            raise self.error(f"{names[0]}={found[0]}, but {names[1]}={found[1]}")
        return found[0] if found else default

    def need(self, key: str, kind: type) -> Any:
        """The value of a key that must be there.

        Raises:
            CheckpointError: it is missing, of another type, or not finite.
        """
        if key not in self.values:
            raise self.error(f"{key} is missing")
        return self.read(key, kind, kind())

    def inside(self, key: str) -> Description:
        """The object under ``key``, with that key before its own in messages; empty if there is
        none.

        Raises:
            CheckpointError: the value is no object.
        """
        schema: Any = dict[str, dict[str, Any] | None]
        value = {key: self.values.get(key)}
        inside = conform(value, schema, self.source, error=CheckpointError)[key]
        return Description(inside or {}, f"{self.source}: {key}")

    def error(self, problem: str) -> CheckpointError:
        """Return the error to raise for a problem with the values."""
        return CheckpointError(f"{self.source}: {problem}")

    def _typed(self, key: str, kind: type, nullable: bool) -> Any:
        schema: Any = dict[str, kind | None] if nullable else dict[str, kind]  # type: ignore[valid-type]
        return conform({key: self.values[key]}, schema, self.source, error=CheckpointError)[key]


def shown(value: object) -> str:
    """A foreign value, short enough for one line."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
