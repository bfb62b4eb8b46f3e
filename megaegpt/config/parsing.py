"""From plain values (YAML, JSON) to typed dataclasses, collecting every problem on the way."""

from __future__ import annotations

import difflib
import math
import types
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from megaegpt.config.removed_keys import is_unused, removal
from megaegpt.config.suggestions import KeyFinder
from megaegpt.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    keys: tuple[str, ...]
    """Dotted keys it is about; rules that depend on them cannot be judged any more."""
    message: str
    """Names the key, its value, what is allowed and the way out."""


_YAML_1_1_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
"""Words that older YAML takes for booleans everywhere; here only where a boolean is wanted."""


class _WrongTypeError(Exception):
    """A value is not of its field's type."""


_SHOWN_PROBLEMS = 30
_SHOWN_CHARACTERS = 1000


def raise_problems(source: str, problems: list[Problem]) -> None:
    """Raise one :class:`ConfigError` that lists the ``problems``; nothing if there is none.

    All that a person would write are shown whole; of endless ones as much as helps.
    """
    if not problems:
        return
    shown = [shorten(problem.message, _SHOWN_CHARACTERS) for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) == 1:
        raise ConfigError(f"{source}: {shown[0]}")
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown):,} more")
    lines = "".join(f"\n  - {message}" for message in shown)
    raise ConfigError(f"{source}: {len(problems)} problems{lines}")


def shorten(text: str, length: int) -> str:
    """``text`` with at most ``length`` characters; dots stand for what is left out."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def parse_section(
    section: type[T],
    values: Any,
    prefix: str,
    problems: list[Problem],
    finder: KeyFinder | None = None,
) -> T:
    """An instance of the dataclass ``section``; absent and wrong fields keep their defaults.

    Args:
        section: a dataclass all of whose fields have defaults.
        values: a mapping, or None for an empty section.
        prefix: dotted key of the section with its final dot; empty at the top.
        problems: unknown keys and wrong types are appended to it.
        finder: finds what is meant by an unknown key; by default among the keys of ``section``.
    """
    finder = finder or KeyFinder(section, prefix)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        name = prefix.rstrip(".") or "the configuration"
        message = f"{name} must be a section of `key: value` lines, not {_show(values)}"
        problems.append(Problem((name,), message))
        return section()
    hints = get_type_hints(section)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if is_unused(dotted, value):
            continue
        if key not in hints:
            few = len(problems) < _SHOWN_PROBLEMS  # for a hint costs time
            meant = finder.find(str(key), section, prefix) if few else []
            problems.append(_unknown_key(dotted, prefix, list(hints), meant))
        elif is_dataclass(hints[key]):
            nested = cast(type[Any], hints[key])
            arguments[key] = parse_section(nested, value, f"{dotted}.", problems, finder)
        elif (item := _section_of_items(hints[key])) and isinstance(value, list | tuple):
            arguments[key] = tuple(
                parse_section(item, entry, f"{dotted}[{number}].", problems)
                for number, entry in enumerate(value)
            )
        else:
            try:
                arguments[key] = _parse_value(value, hints[key])
            except _WrongTypeError as error:
                message = f"{dotted} must be {describe(hints[key])}, not {_show(value)}{error}"
                problems.append(Problem((dotted,), message))
    return section(**arguments)


def annotation_of(section: type[Any], dotted_key: str) -> Any:
    """The type of the field ``dotted_key`` below ``section``; None where there is no such field."""
    annotation: Any = section
    for part in dotted_key.split("."):
        if not is_dataclass(annotation):
            return None
        annotation = get_type_hints(annotation).get(part)
    return annotation


def accepts_text(annotation: Any) -> bool:
    """A string is a value of this type."""
    return annotation is str or (_is_union(annotation) and str in get_args(annotation))


def _section_of_items(annotation: Any) -> type[Any] | None:
    """The dataclass of which a field holds a list; None where it holds something else."""
    item = get_args(annotation)[0] if get_origin(annotation) is tuple else None
    return cast(type[Any], item) if is_dataclass(item) else None


def describe(annotation: Any) -> str:
    """Describe the values that a user may write for a field of this type, in words."""
    if _is_union(annotation):
        return " or ".join(describe(choice) for choice in get_args(annotation))
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if (item := _section_of_items(annotation)) is not None:
        return f"a list of {{{', '.join(get_type_hints(item))}}}"
    if get_origin(annotation) is tuple:
        return "a list of strings" if get_args(annotation)[0] is str else "a list of numbers"
    if get_origin(annotation) is dict:
        return "a mapping"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    return words.get(annotation, "null")


def _parse_value(value: Any, annotation: Any) -> Any:
    """``value`` as ``annotation`` wants it; :class:`_WrongTypeError` may carry a hint."""
    if _is_union(annotation):
        choices = get_args(annotation)
        if value is None and types.NoneType in choices:
            return None
        words = [choice for choice in choices if get_origin(choice) is Literal]
        if words and isinstance(value, str):
            return _parse_value(value, words[0])
        return _parse_value(value, next(c for c in choices if c is not types.NoneType))
    if get_origin(annotation) is Literal:
        return _parse_choice(value, get_args(annotation))
    if get_origin(annotation) is tuple:
        # A lone string is a list of one: `data.train: data/book/train`.
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise _WrongTypeError
        return tuple(_parse_value(item, get_args(annotation)[0]) for item in items)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    if annotation is bool and isinstance(value, str):
        value = _YAML_1_1_BOOLEANS.get(value.lower(), value)
    wanted = get_origin(annotation) or annotation
    if type(value) is not wanted:  # not isinstance: a bool is an int to Python, not to a user
        raise _WrongTypeError(" (quote it to make it a string)" if wanted is str else "")
    if wanted is float and not math.isfinite(value):
        raise _WrongTypeError(" (it must be finite)")
    return value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _parse_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return value
    close = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
    raise _WrongTypeError(f"; did you mean {close[0]}?" if close else "")


def _unknown_key(dotted: str, prefix: str, known: list[str], meant: list[str]) -> Problem:
    """The problem of a key that no field has, with the valid keys that may be meant."""
    if sentence := removal(dotted):
        return Problem((dotted,), sentence)
    if meant:
        *others, last = meant
        choice = f"{', '.join(others)} or {last}" if others else last
        return Problem((dotted, *meant), f"{dotted} is not a key; did you mean {choice}?")
    where = f"of {prefix.rstrip('.')}" if prefix else "at the top"
    message = f"{dotted} is not a key; the keys {where} are {', '.join(known)}"
    return Problem((dotted,), message)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (types.UnionType, Union)


def _show(value: Any) -> str:
    """A value as the user would write it in YAML, short enough for one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return shorten(repr(value), 60)
