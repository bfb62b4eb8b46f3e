"""The exceptions a user can meet: one line that says what is wrong, where, and how to fix it.

A program shows them without a traceback, and so it does what :mod:`megaegpt.environment` knows the
cause of; anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from megaegpt import environment

_RANK_0_SPEAKS_S = 3.0
"""Launchers end the other ranks when one exits: rank 0 needs this long to show its message."""


class MegaEGPTError(Exception):
    """Base of every error that is the user's to fix."""

    on_every_rank = False
    """Every rank of a distributed run raises it, so rank 0 alone shows it."""

    on_whole_machine = False
    """Every rank of a machine raises it, so the first of them alone shows it."""


class ConfigError(MegaEGPTError):
    """A configuration file, override or combination of values that cannot be run."""


class DataError(MegaEGPTError):
    """Text, shards or features that are malformed, truncated, foreign or missing."""


class FolderInUseError(DataError):
    """A folder that another process is writing into."""


class DamagedManifestError(DataError):
    """A manifest of shards that no longer tells what they are."""


class ChatTemplateError(DataError):
    """A chat template's process that did not answer in time, or is gone: on a busy machine, that is
    no fault of the conversation's.
    """


class CheckpointError(MegaEGPTError):
    """A checkpoint or weights folder that is incomplete, damaged or of another model."""


class TrainingError(MegaEGPTError):
    """A run that cannot go on, such as one whose loss is not finite."""


class NotFiniteError(MegaEGPTError):
    """A model that computes infinities or no numbers where probabilities are asked for."""


class LaunchError(MegaEGPTError):
    """Processes, devices or addresses that do not fit together."""


def first_line(error: BaseException) -> str:
    """What an exception says, cut to a line; its kind where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def exits_cleanly(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a program's ``main``: what is the user's to fix becomes one line on stderr and exit
    code 2, our errors and those of the program's surroundings alike; the rest is a bug and keeps
    its traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        environment.prepare()
        try:
            _run(main)
        except MegaEGPTError as error:
            if (error.on_every_rank and environment.is_other_rank()) or (
                error.on_whole_machine and environment.is_other_local_rank()
            ):
                time.sleep(_RANK_0_SPEAKS_S)
                sys.exit(2)
            _end(f"error: {error}", 2)
        except KeyboardInterrupt:
            _end("interrupted", 130)
        except Exception as error:
            if environment.reader_has_left(error):
                environment.abandon_output()
                sys.exit(environment.CLOSED_PIPE_CODE)
            cause = environment.cause_of(error)
            if cause is None:
                raise
            _end(f"error: {cause}", 2)

    return wrapped


def _run(main: Callable[[], None]) -> None:
    try:
        main()
    except SystemExit:  # of --help, say
        environment.flush_output()
        raise
    environment.flush_output()


def _end(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # a full disk behind stderr, or its reader has left
        print(message, file=sys.stderr, flush=True)
    try:
        environment.flush_output()
    except OSError:
        environment.abandon_output()
    sys.exit(code)
