"""Parameters with a learning rate or a weight decay of their own, chosen by their names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megaegpt.config.parsing import Problem
from megaegpt.config.ranges import NonNegativeFloat, PositiveFloat
from megaegpt.errors import ConfigError

KEY = "optimizer.groups"


@dataclass(frozen=True)
class ParameterGroup:
    """An entry of ``optimizer.groups``."""

    match: str = ""
    """Pattern of the parameters' names, as a shell has them for files: ``*.bias``,
    ``stack.blocks.[01].*``. It stands for whole names."""
    lr_scale: PositiveFloat = 1.0
    """Factor of the learning rate, at every step of the schedule."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay of all parameters of the group, vectors too. None: as without the
    entry."""


def parameter_group_problems(groups: Sequence[ParameterGroup]) -> Iterator[Problem]:
    """Entries that say nothing of which parameters they are for."""
    for number, group in enumerate(groups):
        if not group.match:
            key = f"{KEY}[{number}].match"
            yield Problem((key,), f"{key} is missing: give a pattern of names, such as '*.bias'")


def assign_groups(names: Sequence[str], groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """Give every parameter to the first entry that matches its name.

    Args:
        names: of the trainable parameters.
        groups: ``optimizer.groups``.

    Returns:
        The names of each entry, in the order of ``names``; last those that no entry matches.

    Raises:
        ConfigError: an entry is left without a parameter.
    """
    left = list(names)
    assigned = []
    for number, group in enumerate(groups):
        chosen = {name for name in left if fnmatch.fnmatchcase(name, group.match)}
        if not chosen:
            raise ConfigError(f"{KEY}[{number}].match: {_why_empty(group.match, names)}")
        assigned.append([name for name in left if name in chosen])
        left = [name for name in left if name not in chosen]
    return [*assigned, left]


def _why_empty(pattern: str, names: Sequence[str]) -> str:
    if fnmatch.filter(names, pattern):
        return f"earlier entries match all parameters that {pattern!r} does: put it before them"
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"{pattern!r} matches no trainable parameter; their names are like {', '.join(near)}"
