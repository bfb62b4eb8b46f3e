"""YAML file + ``section.key=value`` overrides -> :class:`RunConfig`, and back.

Example:
    >>> config = load_config("configs/gpt2_124m.yaml", ["training.steps=100", "optimizer.lr=1e-3"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megaegpt.config.model import ModelConfig
from megaegpt.config.parsing import (
    Problem,
    accepts_text,
    annotation_of,
    parse_section,
    raise_problems,
)
from megaegpt.config.paths import expand_paths
from megaegpt.config.run import RunConfig
from megaegpt.config.run_files import RunValues, find_run_file, merged, read_run_file
from megaegpt.config.suggestions import LIKELY_RUN_KEYS, KeyFinder
from megaegpt.config.validation import find_problems, validate
from megaegpt.config.yaml_text import parse_yaml, write_yaml

__all__ = [
    "config_from_values",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "model_config_from_dict",
    "run_config_from_dict",
    "validate",
]


def load_config(
    path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None
) -> RunConfig:
    """Read a run's configuration and check all that can be checked without starting it.

    Args:
        path: YAML file, which may extend others (``run_files``), or the name of one that comes with
            the package (:func:`~megaegpt.shipped.find_config`).
        overrides: ``section.key=value`` texts, applied in order on top of the file; values are YAML
            (text fields take theirs as it stands, unless quoted or ``null``).
        world_size: number of processes, if it is known already; else :func:`validate` later.

    Raises:
        ConfigError: the file cannot be read; or one message with every unknown key (and the closest
            valid one), wrong type and combination of values that cannot be run.
    """
    path = find_run_file(path)
    return _checked(read_run_file(path), str(path), overrides, world_size)


def config_from_values(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The same from nested mappings, such as ``{"training": {"steps": 100}}``.

    Raises:
        ConfigError: as for :func:`load_config`.
    """
    return _checked(RunValues(merged({}, dict(values))), "the configuration", overrides, None)


def _checked(
    run: RunValues, source: str, overrides: Sequence[str], world_size: int | None
) -> RunConfig:
    """The run under its overrides; everything that is wrong with it is reported at once."""
    problems = run.problems
    _apply_overrides(run, overrides)
    config = run_config_from_dict(run.values, problems)
    broken = {key for problem in problems for key in problem.keys}
    # Of a run that fine-tunes, the weights say what the model is, and nothing here need.
    found = find_problems(config, world_size, model_is_known=not config.data.instructions.train)
    problems += [p for p in found if broken.isdisjoint(p.keys)]
    for number, problem in enumerate(problems):
        if problem.keys and (origin := run.origins.get(problem.keys[0])):
            problems[number] = Problem(problem.keys, f"{problem.message} ({origin})")
    raise_problems(source, problems)
    return config


def run_config_from_dict(values: dict[str, Any], problems: list[Problem]) -> RunConfig:
    """A run from its plain values, with its paths expanded; what is wrong is appended to
    ``problems``. Rules between values are left to :func:`find_problems`.
    """
    finder = KeyFinder(RunConfig, likely=LIKELY_RUN_KEYS)
    return expand_paths(parse_section(RunConfig, values, "", problems, finder), problems)


def model_config_from_dict(values: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The model described by a weights folder's ``config.json``.

    Raises:
        ConfigError: unknown keys or wrong types; ``source`` says where they were found.
    """
    problems: list[Problem] = []
    config = parse_section(ModelConfig, values, "", problems)
    raise_problems(source, problems)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """Any configuration dataclass as plain dicts, lists and scalars, ready for YAML and JSON."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def config_to_yaml(config: RunConfig) -> str:
    """The configuration with every default, as YAML that :func:`load_config` reads back."""
    return write_yaml(config_to_dict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _apply_overrides(run: RunValues, overrides: Sequence[str]) -> None:
    """Write the overrides into the nested values of ``run``."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        dotted = dotted.strip()
        if not equals or not all(dotted.split(".")):
            run.problems.append(Problem((), f"{override!r} must have the form section.key=value"))
            continue
        try:
            value = _override_value(text, annotation_of(RunConfig, dotted))
        except yaml.YAMLError:
            run.problems.append(Problem((dotted,), f"{dotted}={text} is not a YAML value"))
            continue
        *sections, key = dotted.split(".")
        target, prefix = run.values, ""
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target, prefix = target[section], f"{prefix}{section}"
            run.origins.setdefault(prefix, "command line")
            prefix += "."
        target[key] = value
        run.origins[dotted] = "command line"


def _override_value(text: str, annotation: Any) -> Any:
    """The value of an override; text fields keep what YAML would interpret (spaces, colons)."""
    quoted = text.startswith(("'", '"'))
    if accepts_text(annotation) and not quoted and text not in ("null", "~"):
        return text
    value, _ = parse_yaml(text)
    return value
