"""Paths in a configuration: ``~`` and environment variables stand for what they mean in a shell."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar

from megaegpt.config.metadata import annotations_of, leaves, metadata
from megaegpt.config.parsing import Problem

T = TypeVar("T")

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


@dataclass(frozen=True)
class _PathMark:
    """Marks a text as the name of a file or folder."""


PathText = Annotated[str, _PathMark()]
"""The type of a field that holds a path, a glob of paths, or what may be one."""


def expand_path(text: str) -> str:
    """``text`` with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced.

    Raises:
        ValueError: a variable that is not set or is empty, or a user that does not exist.
    """
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ValueError(f"there is no home folder for {text.split('/', 1)[0]!r}")

    def value_of(match: re.Match[str]) -> str:
        value = os.environ.get(match[1] or match[2])
        if not value:
            raise ValueError(f"the environment variable {match[0]} is not set")
        return value

    return _VARIABLE.sub(value_of, expanded)


def expand_paths(section: T, problems: list[Problem], prefix: str = "") -> T:
    """``section`` with every path in it expanded; what cannot be is appended to ``problems``."""
    annotations = annotations_of(type(section))
    changes: dict[str, Any] = {}
    for field in fields(section):  # type: ignore[arg-type]
        value, dotted = getattr(section, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            changes[field.name] = expand_paths(value, problems, f"{dotted}.")
        elif value and metadata(annotations[field.name], _PathMark):
            try:
                changes[field.name] = (
                    tuple(map(expand_path, value))
                    if isinstance(value, tuple)
                    else expand_path(value)
                )
            except ValueError as error:
                problems.append(Problem((dotted,), f"{dotted}={_shown(value)}: {error}"))
    return replace(section, **changes)  # type: ignore[type-var]


def path_problems(section: Any) -> Iterator[Problem]:
    """Paths that no file system has: empty ones, and ones that hold a NUL character."""
    for dotted, annotation, value in leaves(section):
        if value is None or not metadata(annotation, _PathMark):
            continue
        for path in value if isinstance(value, tuple) else (value,):
            if not path:
                yield Problem((dotted,), f"{dotted} must not be an empty path")
            elif "\0" in path:
                yield Problem((dotted,), f"{dotted}={_shown(path)} holds a NUL character")


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)
