"""What is evaluated by name: ``data.validation_sets`` as ``NAME=PREFIX``, ``data.tasks`` as
``NAME=FILE``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megaegpt.config.parsing import Problem
from megaegpt.config.paths import expand_path
from megaegpt.config.run import RunConfig

_SETS, _TASKS = "data.validation_sets", "data.tasks"
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


def task_files(entries: tuple[str, ...]) -> dict[str, Path]:
    """The file of each task by its name, in order, expanded.

    Raises:
        ValueError: of :func:`~megaegpt.config.paths.expand_path`.
    """
    pairs = (entry.split("=", 1) for entry in entries)
    return {name: Path(expand_path(file)) for name, file in pairs}


def named_evaluation_problems(config: RunConfig) -> Iterator[Problem]:
    """Entries that name no set and no task, and keys that need one which is not there."""
    data, names = config.data, {"validation"}
    for entry in data.validation_sets:
        yield from _entry_problems(_SETS, "PREFIX", entry, set())
        names.add(entry.split("=", 1)[0])
    for entry in data.tasks:
        yield from _entry_problems(_TASKS, "FILE", entry, names)
        names.add(entry.split("=", 1)[0])
    if data.validation_sets and data.train and not data.validation:
        yield Problem(
            (_SETS, "data.validation"), f"{_SETS} stand beside data.validation, which is empty"
        )
    if config.checkpoint.best_of not in names:
        yield Problem(
            ("checkpoint.best_of", _SETS, _TASKS),
            f"checkpoint.best_of={config.checkpoint.best_of} is no validation set or task: "
            f"use one of {', '.join(sorted(names))}",
        )


def _entry_problems(key: str, value: str, entry: str, others: set[str]) -> Iterator[Problem]:
    """What is wrong with ``NAME=value``, whose name must not be among ``others``."""
    match = _ENTRY.fullmatch(entry)
    if match is None:
        yield Problem(
            (key,),
            f"{key}: {entry!r} must be NAME={value}, with a name of letters, digits, _ . or -",
        )
        return
    if match[1] in _TAKEN:
        yield Problem((key,), f"{key}: {match[1]!r} has a meaning already: take another name")
    elif match[1] in others:
        yield Problem((key,), f"{key}: {match[1]!r} is there twice: take another name")
    try:
        expand_path(match[2])
    except ValueError as error:
        yield Problem((key,), f"{key}: {entry!r}: {error}")
