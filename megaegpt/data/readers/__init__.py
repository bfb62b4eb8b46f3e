"""One reader a source of text; all of them stream, and yield :class:`Document`.

``read_documents("enron", paths, problems, keep_quoted=True)`` is the way in. Each reader is the
function ``read(paths, problems, *, option=default, ...)`` of its module, beside ``SUFFIXES``, the
names it takes below a folder.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megaegpt.data.readers.documents import Document, Problems
from megaegpt.errors import ConfigError

_MODULES = {
    "text": "plain",
    "jsonl": "json_lines",
    "parquet": "parquet",
    "gutenberg": "gutenberg",
    "cnn": "cnn",
    "enron": "enron",
    "openwebtext": "openwebtext",
    "wikipedia": "wikipedia",
    "transwebedu": "transwebedu",
}
READERS = tuple(_MODULES)
"""Names of the sources that can be read."""

Option = str | bool


def read_documents(
    source: str, paths: Iterable[Path | str], problems: Problems, **options: Option
) -> Iterator[Document]:
    """Documents of files and folders in the native format of a source, in a fixed order.

    Args:
        source: one of :data:`READERS`.
        paths: files, or folders that are searched.
        problems: what happens to input that cannot be used.
        options: the reader's own; see :func:`reader_options`.

    Raises:
        ConfigError: an unknown source or option.
        DataError: a path does not exist, or bad input under the policy ``fail``.
    """
    known = reader_options(source)
    for name, value in options.items():
        if name not in known:
            raise ConfigError(_unknown("option", name, known, f"reader {source!r}"))
        if type(value) is not type(known[name]):
            kind = type(known[name]).__name__
            raise ConfigError(f"reader {source!r}: option {name!r} must be a {kind}, not {value!r}")
    # A caller's own kind of path may know how far its file is read.
    given = (path if isinstance(path, Path) else Path(path) for path in paths)
    return _reader(source)(given, problems, **options)


def reader_suffixes(source: str) -> tuple[str, ...] | None:
    """How the names of the files end that a reader takes below a folder; None: all names.

    Raises:
        ConfigError: no such reader.
    """
    suffixes: tuple[str, ...] | None = _module(source).SUFFIXES
    return suffixes


def reader_options(source: str) -> dict[str, Option]:
    """The options of a reader and their defaults.

    Raises:
        ConfigError: no such reader.
    """
    parameters = inspect.signature(_reader(source)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def parse_reader_options(source: str, assignments: Iterable[str]) -> dict[str, Option]:
    """Options out of ``name=value`` strings; a bare ``name`` switches a yes/no option on.

    Raises:
        ConfigError: an unknown option, or a value that is not yes or no where it must be.
    """
    known = reader_options(source)
    options: dict[str, Option] = {}
    for assignment in assignments:
        name, given, value = assignment.partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise ConfigError(_unknown("option", name, known, f"reader {source!r}"))
        if isinstance(known[name], bool):
            truth = {"true": True, "yes": True, "false": False, "no": False}
            if given and value.lower() not in truth:
                raise ConfigError(
                    f"reader {source!r}: option {name!r} is true or false, not {value!r}"
                )
            options[name] = truth[value.lower()] if given else True
        elif given:
            options[name] = value
        else:
            raise ConfigError(f"reader {source!r}: option {name!r} needs a value: {name}=...")
    return options


def _reader(source: str) -> Callable[..., Iterator[Document]]:
    reader: Callable[..., Iterator[Document]] = _module(source).read
    return reader


def _module(source: str) -> Any:
    if source not in _MODULES:
        raise ConfigError(_unknown("format", source, _MODULES, "the readers"))
    return importlib.import_module(f"{__name__}.{_MODULES[source]}")


def _unknown(what: str, name: str, known: Iterable[str], where: str) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{where}: no {what} {name!r}; {hint}there are {', '.join(names) or 'none'}"
