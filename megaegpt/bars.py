"""What long work says of itself on stderr: progress bars, often on a terminal and seldom in the
file of a job's output, and lines for work whose end is not known."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")

_TERMINAL_S, _FILE_S = 0.2, 30.0

SILENT_S = 2.0
"""Seconds of work without a word from which on :func:`telling_if_slow` says what is done."""


@contextlib.contextmanager
def telling_if_slow(text: str) -> Iterator[None]:
    """Say ``text`` once, in a line on stderr, where the block takes longer than :data:`SILENT_S`.

    Example:
        >>> with telling_if_slow("loading runs/egpt ..."):
        ...     pass
    """
    timer = threading.Timer(SILENT_S, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a line that has begun stands before what follows


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
