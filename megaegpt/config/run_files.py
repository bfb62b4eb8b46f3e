"""Run files that extend one another: ``extends: gpt2_124m.yaml``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaegpt.config.deepspeed_keys import dotted_keys
from megaegpt.config.parsing import Problem
from megaegpt.config.paths import expand_path
from megaegpt.config.yaml_text import read_yaml
from megaegpt.errors import ConfigError
from megaegpt.shipped import SHIPPED, find_config, near_configs

_EXTENDS = "extends"
_CONFIGS = SHIPPED / "configs"


@dataclass
class RunValues:
    """The plain values of a run, and where each comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """Origin of a dotted key, as messages name it; keys of the run's own file have none."""
    problems: list[Problem] = field(default_factory=list)


def find_run_file(name: str | Path) -> Path:
    """The file that ``--config`` names, see :func:`~megaegpt.shipped.find_config`.

    Raises:
        ConfigError: there is none; the message has the names that are near.
    """
    path = find_config(name)
    try:
        path.lstat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_which_was_meant(path)}") from None
    except (OSError, ValueError):
        pass  # its reader says what it is
    return path


def _which_was_meant(path: Path) -> str:
    near = near_configs(path)
    return f"did you mean {' or '.join(near)}?" if near else f"those shipped are in {_CONFIGS}"


def read_run_file(path: Path) -> RunValues:
    """A run's file over the file that it extends, over the one that this extends, and so on.

    A file replaces single values, and keeps what it does not mention; a list is one value. The name
    behind ``extends`` is relative to the file it stands in.

    Raises:
        ConfigError: a file of the chain is missing, cannot be read or is no mapping; or the chain
            comes back to one of its files.
    """
    run = RunValues()
    for file, values, problems in reversed(_chain(path)):
        run.values = merged(run.values, values)
        origin = "" if file == path else f"in {file}"
        run.origins |= {key: origin for key, _ in dotted_keys(values)}
        run.problems += problems
    return run


def merged(values: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
    """Nested mappings, those of ``changes`` over those of ``values``; neither is altered.

    An empty section (null) changes nothing.
    """
    result = copy.deepcopy(values)
    for key, value in (changes or {}).items():
        below = result.get(key)
        if isinstance(below, dict) and (value is None or isinstance(value, dict)):
            result[key] = merged(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _chain(path: Path) -> list[tuple[Path, dict[str, Any], list[Problem]]]:
    """The files from ``path`` to the one that extends none, with what they hold."""
    chain: list[tuple[Path, dict[str, Any], list[Problem]]] = []
    while True:
        files = [file for file, *_ in chain]
        if path.resolve() in {file.resolve() for file in files}:
            ring = " -> ".join(map(str, [*files, path]))
            raise ConfigError(f"{files[0]}: extends leads back to a file of its own chain: {ring}")
        try:
            values, problems = read_yaml(path)
        except ConfigError as error:
            if not files:
                raise
            raise ConfigError(f"{files[-1]}: extends {path.name}: {error}") from None
        base = values.pop(_EXTENDS, None)
        chain.append((path, values, problems))
        if base is None:
            return chain
        path = path.parent / _base_name(path, base)


def _base_name(path: Path, base: Any) -> str:
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: extends must be the name of another run's file, not {base!r}")
    try:
        return expand_path(base)
    except ValueError as error:
        raise ConfigError(f"{path}: extends {base}: {error}") from None
