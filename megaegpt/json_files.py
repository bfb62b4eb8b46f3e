"""The one reader of JSON and JSON Lines: a file of another shape than expected is one clear line.

A schema is a type: a dataclass, ``dict[str, X]``, ``list[X]``, ``tuple[X, ...]``, a union, a
``Literal``, ``int``, ``float``, ``bool``, ``str``, None or ``Any``. YAML files are read by
:mod:`megaegpt.config.loading`.

Example:
    >>> manifest = read_json(folder / "manifest.json", Manifest, remedy="make the shards again")
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megaegpt.errors import DataError, MegaEGPTError
from megaegpt.files import check_regular

T = TypeVar("T")

MOST_BYTES = 64 << 20
"""No file or line of ours comes near it; a larger one is another file, or meant to fill memory."""

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_LARGEST = 2**63


class _ShapeError(ValueError):
    """A value is not what the schema wants; the message says where and what."""


def read_json(
    path: Path,
    schema: type[T],
    *,
    error: type[MegaEGPTError] = DataError,
    remedy: str = "",
    missing: str = "",
    other_keys: bool = False,
) -> T:
    """The value in a JSON file, as ``schema`` has it.

    Args:
        path: a regular file in UTF-8, with or without a byte-order mark.
        schema: the type of the value, see above.
        error: class of what is raised.
        remedy: what the user can do about a damaged file.
        missing: what it means that the file does not exist.
        other_keys: dataclasses may have keys in the file that they do not know: another program's.

    Raises:
        MegaEGPTError: as ``error``: the file is missing, cannot be read, is no JSON, or holds
            something else.
    """
    content = read_content(path, error=error, missing=missing)
    return parse_json(content, schema, str(path), error=error, remedy=remedy, other_keys=other_keys)


def read_content(path: Path, *, error: type[MegaEGPTError] = DataError, missing: str = "") -> bytes:
    """What :func:`read_json` parses, for whoever tells a damaged file from one that is not there.

    Raises:
        MegaEGPTError: as ``error``: the file is missing or cannot be read.
    """
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise error(f"{path} does not exist{f': {missing}' if missing else ''}") from None
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {_reason(reason)}") from None


def parse_json(
    content: bytes | str,
    schema: type[T],
    where: str,
    *,
    error: type[MegaEGPTError] = DataError,
    remedy: str = "",
    other_keys: bool = False,
) -> T:
    """As :func:`read_json`, of a text that was read; ``where`` says from which file or line."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text)
        return _converted(value, schema, "", other_keys)
    except (ValueError, RecursionError) as reason:
        hint = f"; {remedy}" if remedy else ""
        raise error(f"{where} is damaged: {_reason(reason)}{hint}") from None


def conform(
    value: Any,
    schema: type[T],
    where: str,
    *,
    error: type[MegaEGPTError] = DataError,
    remedy: str = "",
    other_keys: bool = False,
) -> T:
    """As :func:`parse_json`, of a value that was parsed before."""
    try:
        return _converted(value, schema, "", other_keys)
    except (ValueError, RecursionError) as reason:
        hint = f"; {remedy}" if remedy else ""
        raise error(f"{where} is damaged: {_reason(reason)}{hint}") from None


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """The whole lines of a JSON Lines file, each with ``path:number`` for messages.

    A last line without its end is still being written, and left out.

    Raises:
        OSError: the file cannot be read.
        DataError: a line is longer than any of ours.
    """
    check_regular(path)
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), 1):
            if line.endswith(b"\n"):
                yield line, f"{path}:{number}"
            elif len(line) == MOST_BYTES:
                raise DataError(f"{path}:{number} is damaged: a line of over {MOST_BYTES:,} bytes")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file that is small enough to be one of ours.

    Raises:
        OSError, ValueError: it cannot be read, is a folder, a device or a pipe, or too large.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has over {MOST_BYTES:,} bytes")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start:,}"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    return str(getattr(error, "strerror", None) or error)


# -- shapes ----------------------------------------------------------------------------------------


def _converted(value: Any, schema: Any, place: str, other_keys: bool) -> Any:
    """``value`` with its dataclasses and tuples built."""
    if schema is Any:
        return value
    if dataclasses.is_dataclass(schema):
        return _dataclass(value, schema, place, other_keys)
    origin, arguments = get_origin(schema) or schema, get_args(schema)
    if origin in (Union, types.UnionType):
        return _choice(value, arguments, place, other_keys)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _wrong(value, schema, place)
        return value
    if origin is dict:
        _demand(isinstance(value, dict), value, schema, place)
        inner = arguments[1] if arguments else Any
        return {
            _converted(key, str, f"a key of {place or 'the object'}", other_keys): _converted(
                item, inner, f"{place}.{key}" if place else key, other_keys
            )
            for key, item in value.items()
        }
    if origin in (list, tuple):
        _demand(isinstance(value, list), value, schema, place)
        inner = arguments[0] if arguments else Any
        items = (_converted(v, inner, f"{place}[{n}]", other_keys) for n, v in enumerate(value))
        make: Callable[..., Any] = origin
        return make(items)
    return _scalar(value, schema, place)


def _dataclass(value: Any, schema: Any, place: str, other_keys: bool) -> Any:
    _demand(isinstance(value, dict), value, schema, place)
    hints = get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    prefix = f"{place}." if place else ""
    unknown = [key for key in value if key not in fields]
    if unknown and not other_keys:
        raise _ShapeError(f"{_show(prefix + unknown[0])} is no key of it")
    given = {}
    for name, field in fields.items():
        if name in value:
            given[name] = _converted(value[name], hints[name], prefix + name, other_keys)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _ShapeError(f"{prefix}{name} is missing")
    return schema(**given)


def _choice(value: Any, choices: tuple[Any, ...], place: str, other_keys: bool) -> Any:
    for number, choice in enumerate(choices, 1):
        try:
            return _converted(value, choice, place, other_keys)
        except _ShapeError:
            if number == len(choices):
                raise _wrong(value, Union[choices], place) from None  # noqa: UP007
    return value


def _scalar(value: Any, schema: Any, place: str) -> Any:
    if schema is float and type(value) is int and abs(value) < _LARGEST:
        return float(value)
    wanted = types.NoneType if schema is None else schema
    _demand(type(value) is wanted, value, schema, place)  # a bool is an int to Python, not here
    if wanted is int and abs(value) >= _LARGEST:
        raise _ShapeError(f"{place or 'it'} is too large: {_show(value)}")
    if wanted is float and not math.isfinite(value):
        raise _ShapeError(f"{place or 'it'} must be finite, not {value}")
    if wanted is str and "\0" in value:  # no name of a file may have one
        raise _ShapeError(f"{place or 'it'} holds a NUL character")
    return value


def _demand(right: bool, value: Any, schema: Any, place: str) -> None:
    if not right:
        raise _wrong(value, schema, place)


def _wrong(value: Any, schema: Any, place: str) -> _ShapeError:
    return _ShapeError(f"{place or 'it'} must be {_describe(schema)}, not {_show(value)}")


def _describe(schema: Any) -> str:
    origin, arguments = get_origin(schema) or schema, get_args(schema)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is dict or dataclasses.is_dataclass(schema):
        return "an object"
    if origin in (list, tuple):
        return "a list"
    return _WORDS.get(schema, "null")


def _show(value: Any) -> str:
    """A value as JSON has it, short enough for one line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
