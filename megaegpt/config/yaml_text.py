"""YAML as configurations are written: numbers mean what they look like, and nothing is endless.

Scalars are read by the core schema of YAML 1.2: ``010`` is ten, and ``1:30``, ``yes`` and
``2026-01-01`` are texts. (YAML 1.1, PyYAML's default, has 8, 90, true and a date.) Beyond the core
schema ``1_000_000`` is a number and ``<<`` merges mappings, as in YAML 1.1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megaegpt.config.parsing import Problem, shorten
from megaegpt.errors import ConfigError
from megaegpt.files import check_regular

_MAX_BYTES = 1 << 20
_MAX_VALUES = 20_000
"""Keys and values of a document, each counted as often as aliases repeat it."""
_MAX_DEPTH = 50

_DIGITS = "[0-9][0-9_]*"
_SIGN_OR_DIGIT = list("-+0123456789")
_RESOLVERS: list[tuple[str, str, list[str]]] = [
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?{_DIGITS}|[-+]?0o[0-7]+|[-+]?0x[0-9a-fA-F]+", _SIGN_OR_DIGIT),
    (
        "float",
        rf"[-+]?(\.{_DIGITS}|{_DIGITS}(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        [*_SIGN_OR_DIGIT, "."],
    ),
    ("merge", "<<", ["<"]),
]


class _TooLargeError(yaml.YAMLError):
    """A document that no configuration is."""


class _Loader(yaml.SafeLoader):
    """Safe YAML of the schema above, which notes keys that are given twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[str, int]] = []
        """Dotted keys, with the line (from 1) of their repetition."""
        self._depth = 0
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._count(self._depth)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        self._values = 0
        if node is not None:
            self._examine(node, "", 0)
        return node

    def _examine(self, node: yaml.Node, dotted: str, depth: int) -> None:
        """Walk the document with its aliases written out, before anything is made of it."""
        self._count(depth)
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._examine(item, dotted, depth + 1)
        if not isinstance(node, yaml.MappingNode):
            return
        seen = set()
        for key, value in node.value:
            name = f"{dotted}.{key.value}".lstrip(".")
            self._examine(key, dotted, depth + 1)
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    self.duplicates.append((name, key.start_mark.line + 1))
                seen.add(key.value)
            self._examine(value, name, depth + 1)

    def _count(self, depth: int) -> None:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise _TooLargeError(f"it holds more than {_MAX_VALUES:,} keys and values")
        if depth > _MAX_DEPTH:
            raise _TooLargeError(f"it is nested more than {_MAX_DEPTH} levels deep")

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 16 if "x" in text else 8 if "o" in text else 10)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that keeps every text on one line, as ``"a\\nb"``."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\n" in text else None)


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Dumper.add_representer(str, _Dumper.represent_text)
for _name, _form, _first in _RESOLVERS:
    _pattern = re.compile(rf"(?:{_form})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    # So that a text which looks like one of these is quoted (what YAML 1.1 misreads is, too).
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def parse_yaml(text: str) -> tuple[Any, list[Problem]]:
    """The value of a document, and a problem for each key that it gives twice.

    Raises:
        yaml.YAMLError: it is not YAML, or larger than a configuration is.
    """
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
    except ValueError as error:  # an integer of thousands of digits, say
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()
    return value, [
        Problem((key,), f"line {line}: {key} is given twice") for key, line in loader.duplicates
    ]


def read_yaml(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The mapping in a file, and a problem for each key that it gives twice.

    Raises:
        ConfigError: one line: the file cannot be read, or does not hold such a mapping.
    """
    try:
        values, problems = parse_yaml(_read_text(path))
    except _TooLargeError as error:
        raise ConfigError(f"{path}: this is no configuration: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {shorten(str(error.problem), 200)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `section: ...` lines, not {type(values).__name__}")
    return values, problems


def write_yaml(values: dict[str, Any]) -> str:
    """Nested mappings as YAML that :func:`read_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_text(path: Path) -> str:
    try:
        if not path.is_relative_to("/dev"):  # such as the /dev/fd/63 of a shell's <(command)
            check_regular(path)
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: this is no configuration: it is larger than 1 MiB")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
