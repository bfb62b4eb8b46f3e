"""Progress bars on stderr: often on a terminal, seldom in the file of a job's output."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")

_TERMINAL_S, _FILE_S = 0.2, 30.0


@overload
def progress_bar(iterable: Iterable[T], title: str | None = None, **options: Any) -> tqdm[T]: ...


@overload
def progress_bar(
    iterable: None = None, title: str | None = None, **options: Any
) -> tqdm[NoReturn]: ...


def progress_bar(
    iterable: Iterable[Any] | None = None, title: str | None = None, **options: Any
) -> tqdm[Any]:
    """A bar of tqdm's, drawn anew every 0.2 s. Where stderr is no terminal it is drawn every 30 s,
    so not at all for shorter work, and ends with a newline: nothing can be wiped from a file.

    Args:
        iterable: what is walked through; None: the bar is moved by its method ``update``.
        title: before it.
        options: of tqdm.
    """
    interval = _TERMINAL_S
    if not sys.stderr.isatty():
        interval = _FILE_S
        options |= {"leave": True, "delay": _FILE_S}
    return tqdm(iterable, title, mininterval=interval, maxinterval=2 * interval, **options)
