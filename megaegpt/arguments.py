"""Types of command-line arguments: a value out of range is refused before anything is read.

Example:
    >>> parser.add_argument("--batch-size", type=integer(1), default=4)
    >>> parser.add_argument("--efficiency", type=number(above=0, most=1))
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ArgumentParser(argparse.ArgumentParser):
    """Refuses ``--option=--``, for which Python before 3.13 gives an empty list."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        for text in given:
            if found := re.fullmatch(r"(--[a-z][a-z_-]*)=--", text):
                self.error(f"{found[1]} needs a value, not '--'")
        return super().parse_known_args(given, namespace)


LARGEST_SEED = 2**63 - 1
"""Largest seed that torch, NumPy and the package's own generators all take."""

_MOST = 2**31 - 1
"""Larger counts of anything that a command line asks for are mistakes."""


def integer(least: int, most: int = _MOST) -> Callable[[str], int]:
    """Integers from ``least`` to ``most``, in decimal digits."""

    def parse(text: str) -> int:
        if re.fullmatch(r"[-+]?[0-9]{1,20}", text) and least <= int(text) <= most:
            return int(text)
        bounds = f"of at least {least:,}" if most == _MOST else f"from {least:,} to {most:,}"
        raise argparse.ArgumentTypeError(f"must be an integer {bounds}, not {_short(text)}")

    return parse


def number(
    *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Callable[[str], float]:
    """Finite numbers in a range that has, or (``above``) has not, its lower end."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (
            math.isfinite(value)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
        )
        if inside:
            return value
        ends = (("at least", least), ("above", above), ("at most", most))
        bounds = " and ".join(f"{word} {end:,g}" for word, end in ends if end is not None)
        wanted = f"a number {bounds}" if bounds else "a finite number"
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {_short(text)}")

    return parse


seed = integer(0, LARGEST_SEED)
"""Seeds of random numbers."""


def path(text: str) -> Path:
    """The name of a file or folder: not empty, which would be the working directory. A shell
    leaves the ``~`` of ``--output=~/shards`` as it is.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must be the name of a file or folder")
    if text != "~" and not text.startswith("~/"):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no home folder: set HOME") from None


def input_name(text: str) -> str:
    """The name or pattern of what is read: not empty, which would be the working directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must be the name of a file or folder")
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
