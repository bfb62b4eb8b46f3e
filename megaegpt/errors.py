"""The exceptions a user can meet: one line that says what is wrong, where, and how to fix it.

A program shows them without a traceback; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable

_RANK_0_SPEAKS_S = 3.0
"""Launchers end the other ranks when one exits: rank 0 needs this long to show its message."""


class MegaEGPTError(Exception):
    """Base of every error that is the user's to fix."""

    on_every_rank = False
    """Every rank of a distributed run raises it, so rank 0 alone shows it."""


class ConfigError(MegaEGPTError):
    """A configuration file, override or combination of values that cannot be run."""


class DataError(MegaEGPTError):
    """Text, shards or features that are malformed, truncated, foreign or missing."""


class CheckpointError(MegaEGPTError):
    """A checkpoint or weights folder that is incomplete, damaged or of another model."""


class TrainingError(MegaEGPTError):
    """A run that cannot go on, such as one whose loss is not finite."""


class LaunchError(MegaEGPTError):
    """Processes, devices or addresses that do not fit together."""


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a program's ``main``: our errors become one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except MegaEGPTError as error:
            if error.on_every_rank and os.environ.get("RANK", "0") != "0":
                time.sleep(_RANK_0_SPEAKS_S)
            else:
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)

    return wrapped
