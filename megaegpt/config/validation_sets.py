"""Validation sets by name, written as ``NAME=PREFIX`` in ``data.validation_sets``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megaegpt.config.parsing import Problem
from megaegpt.config.paths import expand_path
from megaegpt.config.run import RunConfig

_KEY = "data.validation_sets"
_ENTRY = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)
_TAKEN = {"train", "validation"}


def validation_sets(entries: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The prefixes of each set in order, expanded; entries of one name belong together.

    Raises:
        ValueError: of :func:`~megaegpt.config.paths.expand_path`.
    """
    sets: dict[str, tuple[str, ...]] = {}
    for entry in entries:
        name, prefix = entry.split("=", 1)
        sets[name] = (*sets.get(name, ()), expand_path(prefix))
    return sets


def validation_set_problems(config: RunConfig) -> Iterator[Problem]:
    """Entries that name no set, and keys that need a set which is not there."""
    entries, names = config.data.validation_sets, {"validation"}
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        if match is None:
            yield Problem(
                (_KEY,),
                f"{_KEY}: {entry!r} must be NAME=PREFIX, with a name of letters, digits, _ . or -",
            )
        elif match[1] in _TAKEN:
            yield Problem((_KEY,), f"{_KEY}: {match[1]!r} has a meaning already: take another name")
        else:
            names.add(match[1])
            try:
                expand_path(match[2])
            except ValueError as error:
                yield Problem((_KEY,), f"{_KEY}: {entry!r}: {error}")
    if entries and config.data.train and not config.data.validation:
        yield Problem(
            (_KEY, "data.validation"), f"{_KEY} stand beside data.validation, which is empty"
        )
    if config.checkpoint.best_of not in names:
        yield Problem(
            ("checkpoint.best_of", _KEY),
            f"checkpoint.best_of={config.checkpoint.best_of} is no validation set: "
            f"use one of {', '.join(sorted(names))}",
        )
