"""YAML file + ``section.key=value`` overrides -> :class:`RunConfig`, and back.

Example:
    >>> config = load_config("configs/gpt2_124m.yaml", ["training.steps=100", "optimizer.lr=1e-3"])
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
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
from megaegpt.config.run import RunConfig
from megaegpt.config.validation import find_problems, validate
from megaegpt.errors import ConfigError

__all__ = [
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "model_config_from_dict",
    "validate",
]


def load_config(
    path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None
) -> RunConfig:
    """Read a run's configuration and check all that can be checked without starting it.

    Args:
        path: YAML file.
        overrides: ``section.key=value`` texts, applied in order on top of the file; values are YAML
            (text fields take theirs as it stands, unless quoted or ``null``).
        world_size: number of processes, if it is known already; else :func:`validate` later.

    Raises:
        ConfigError: the file cannot be read; or one message with every unknown key (and the closest
            valid one), wrong type and combination of values that cannot be run.
    """
    values, problems = read_yaml(Path(path))
    from_command_line = _apply_overrides(values, overrides, problems)
    config = parse_section(RunConfig, values, "", problems)
    broken = {key for problem in problems for key in problem.keys}
    problems += [p for p in find_problems(config, world_size) if broken.isdisjoint(p.keys)]
    for number, problem in enumerate(problems):
        if problem.keys and problem.keys[0] in from_command_line:
            problems[number] = Problem(problem.keys, f"{problem.message} (command line)")
    raise_problems(str(path), problems)
    return config


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
    values = config_to_dict(config)
    return yaml.dump(values, Dumper=_LineDumper, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class _LineDumper(yaml.SafeDumper):
    """Safe YAML that keeps every text on one line, as ``"a\\nb"``."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\n" in text else None)


_LineDumper.add_representer(str, _LineDumper.represent_text)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that notes duplicate keys and reads ``1e-3`` as a number (YAML 1.1: a string)."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                self.duplicates.append(f"line {line}: {key_node.value} is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The document and its duplicate keys; :class:`yaml.YAMLError` if it is not YAML."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data(), loader.duplicates
    except (ValueError, RecursionError) as error:  # of a date 2001-99-99, say, or endless nesting
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def read_yaml(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The file's mapping, and problems for its duplicate keys."""
    try:
        values, duplicates = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `section: ...` lines, not {type(values).__name__}")
    return values, [Problem((), message) for message in duplicates]


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], problems: list[Problem]
) -> set[str]:
    """Write the overrides into the nested ``values``; returns their dotted keys."""
    keys = set()
    for override in overrides:
        dotted, equals, text = override.partition("=")
        dotted = dotted.strip()
        if not equals or not all(dotted.split(".")):
            problems.append(Problem((), f"{override!r} must have the form section.key=value"))
            continue
        try:
            value = _override_value(text, annotation_of(RunConfig, dotted))
        except yaml.YAMLError:
            problems.append(Problem((dotted,), f"{dotted}={text} is not a YAML value"))
            continue
        *sections, key = dotted.split(".")
        target = values
        for section in sections:
            if not isinstance(target.get(section), dict):
                target[section] = {}
            target = target[section]
        target[key] = value
        keys.add(dotted)
    return keys


def _override_value(text: str, annotation: Any) -> Any:
    """The value of an override; text fields keep what YAML would interpret (spaces, colons)."""
    quoted = text.startswith(("'", '"'))
    if accepts_text(annotation) and not quoted and text not in ("null", "~"):
        return text
    value, _ = _parse_yaml(text)
    return value
