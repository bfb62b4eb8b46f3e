"""The surroundings of a program that a user can put right: streams, disks, memory, ports, limits.

:func:`prepare` makes good what can be made good before a program starts; :func:`cause_of` says in
one line what is wrong around the program, if that is where an exception comes from. Both serve
:func:`megaegpt.errors.exits_cleanly`, so every program has them.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import pwd
import re
import select
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO, cast

CLOSED_PIPE_CODE = 141
"""Exit code of a program whose reader has left (``... | head``): that of a death by SIGPIPE."""

_OUT_OF_MEMORY = (
    "out of memory: lower the batch (training.micro_batch_size, --batch-size) or the context, "
    "recompute by training.activation_checkpointing, or start fewer processes on this machine"
)
_FREE_SPACE = "free some space, or write to another disk"
_PORT = "choose another port: `deepspeed --master_port N` or `torchrun --master_port N`"

_HINTS = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "raise the limit: `ulimit -f unlimited`",
    errno.EROFS: "write to another folder",
    errno.EACCES: "see who owns it and may use it: `ls -ld`",
    errno.EPERM: "see who owns it and may use it: `ls -ld`",
    errno.EMFILE: "raise the limit: `ulimit -n 65536`",
    errno.ENFILE: "this machine has too many files open: ask its administrator",
    errno.EADDRINUSE: _PORT,
    errno.EADDRNOTAVAIL: "MASTER_ADDR must be an address of the machine of rank 0",
    errno.EIO: "the disk or its connection fails",
    errno.ESTALE: "the network disk has lost the file: start again",
    errno.EAGAIN: "this user may start no more processes or threads: `ulimit -u`",
}
"""Remedies for a failed call of the operating system, by its error number."""

_OF_A_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.EINVAL,
    errno.ETXTBSY,
    errno.EBUSY,
    errno.EXDEV,
}
"""Errors that are the user's where they name a path; without one they are the program's."""

_TEXTS = [
    (r"can't allocate memory|out of memory|ALLOC_FAILED|not enough memory", _OUT_OF_MEMORY),
    (r"Cannot allocate memory", _OUT_OF_MEMORY),
    (r"address already in use|EADDRINUSE", f"a port is in use by another program: {_PORT}"),
    (r"can't start new thread", f"no new thread can be started: {_HINTS[errno.EAGAIN]}"),
    (r"embedded null (byte|character)", "a name of a file or folder holds a NUL character"),
    (r"No usable temporary directory", "no temporary folder can be written: set TMPDIR to one"),
    (r"home directory", "there is no home directory: set HOME"),
    (
        r"PytorchStreamWriter failed|unexpected pos \d+ vs",
        f"a file cannot be written: {_FREE_SPACE}",
    ),
    (r"no NVIDIA driver|driver .* is too old", "the NVIDIA driver is missing or too old for torch"),
    (r"Format '.*' is not supported", "a picture's name must end in .png, .svg, .pdf or .jpg"),
    (r"Symlink loop", "a path leads in a ring of symbolic links"),
    (r"no kernel image is available", "this build of torch has no code for this GPU"),
    (r"unable to (open|mmap|write).*shared memory|/dev/shm", "/dev/shm is full: enlarge it"),
]
"""Patterns in the messages of libraries that hide what the operating system said."""

_QUOTED = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of the operating system that libraries in C++ quote in a RuntimeError."""

_OF_THE_SYSTEM = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust report it


# -- before a program ------------------------------------------------------------------------------


def prepare() -> None:
    """Let every text be printed, an input that is not there be an empty one, and give a user
    without a name or home what libraries ask for.
    """
    sys.stdin = _open_stream(sys.stdin, "r")  # first, for each takes the lowest number that is free
    sys.stdout, sys.stderr = _open_stream(sys.stdout, "w"), _open_stream(sys.stderr, "w")
    for stream in (sys.stdout, sys.stderr):
        # A sample, a document or a path may hold what the terminal's encoding has not.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _name_the_user()


def _open_stream(stream: TextIO | None, mode: Literal["r", "w"]) -> TextIO:
    """Python has no stream where the descriptor was closed (``<&-``, ``>&-``)."""
    return open(os.devnull, mode, encoding="utf-8") if stream is None else stream


def _name_the_user() -> None:
    """In a container, a user may be a number without an entry in /etc/passwd."""
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # Python would take / for it
    number = os.getuid()
    with contextlib.suppress(KeyError):
        pwd.getpwuid(number)
        return
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["USER"] = f"user{number}"
    if "HOME" not in os.environ:  # caches would go to a folder of the name ~
        with contextlib.suppress(OSError):
            home = Path(tempfile.gettempdir(), f"home-of-user{number}")
            home.mkdir(mode=0o700, exist_ok=True)
            if home.stat().st_uid == number:
                os.environ["HOME"] = str(home)


def is_other_rank() -> bool:
    """Whether a launcher started this process as another rank than 0, which leaves speaking to it.

    A RANK that is left over in a shell is none: without all that launchers set beside it there is
    no rank 0 that would speak.
    """
    if not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        return False
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    known = all(text.isascii() and text.isdigit() and len(text) < 10 for text in (rank, size))
    return known and 0 < int(rank) < int(size)


def is_other_local_rank() -> bool:
    """Whether a launcher started this process as another than the first rank of its machine."""
    return is_other_rank() and os.environ.get("LOCAL_RANK", "") not in ("", "0")


# -- after a failure -------------------------------------------------------------------------------


def cause_of(error: BaseException) -> str | None:
    """Describe the fault around the program in one line; None if it is the program's own.

    Notes on the exception, such as its rank, are part of it.
    """
    cause = _cause(error)
    if cause is None:
        return None
    notes = ", ".join(getattr(error, "__notes__", []))
    return f"{cause} ({notes})" if notes else cause


def _cause(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):  # torch's
        return f"{_OUT_OF_MEMORY} ({'. '.join(text.split('. ')[:2])})"
    if isinstance(error, ModuleNotFoundError) and (package := _missing_package(error)):
        return f"the package {package} is not installed: pip install {package}"
    if found := _OF_THE_SYSTEM.search(text):
        number = int(found[1])
        return _described(number, os.strerror(number), "")
    if isinstance(error, RuntimeError):
        for number in _QUOTED:
            if os.strerror(number) in text:
                return _described(number, os.strerror(number), "")
    if isinstance(error, OSError | RuntimeError | ValueError):
        for pattern, cause in _TEXTS:
            if re.search(pattern, text, re.IGNORECASE):
                return cause
    return _of_call(error) if isinstance(error, OSError) else None


def _missing_package(error: ModuleNotFoundError) -> str | None:
    """None where the package is there and only a module of it is not."""
    package = (error.name or "").partition(".")[0]
    missing = package and importlib.util.find_spec(package) is None
    return package if missing else None


def _of_call(error: OSError) -> str | None:
    """The cause behind a failed call of the operating system."""
    name = next((n for n in (error.filename, error.filename2) if isinstance(n, str | bytes)), None)
    number, reason = error.errno, error.strerror or ""
    if number is None:
        return None
    if name is not None and (number in _HINTS or number in _OF_A_PATH):
        return _described(number, reason, os.fsdecode(name))
    if number == errno.ENOENT and not _has_working_directory():
        return "the working directory does not exist any more: change to another one"
    return _described(number, reason, "") if number in _HINTS else None


def _described(number: int, reason: str, name: str) -> str:
    hint = f": {_HINTS[number]}" if number in _HINTS else ""
    return f"{name}: {reason}{hint}" if name else f"{reason}{hint}"


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


# -- output that nobody reads ----------------------------------------------------------------------


def flush_output() -> None:
    """Let what cannot be printed be known now, not when the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def reader_has_left(error: BaseException) -> bool:
    """Whether ``error`` is of printing to a pipe that nobody reads any more, or to a terminal that
    is gone.
    """
    of_printing = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO)
    return of_printing and any(_is_unread(descriptor) for descriptor in (1, 2))


def _is_unread(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def abandon_output() -> None:
    """Drop what is still to be printed: the interpreter's end would complain about it again."""
    _drop(descriptor for descriptor in (1, 2) if descriptor == 1 or _is_unread(descriptor))


def _drop(descriptors: Iterable[int]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def outliving_readers(left: Callable[[], None]) -> Iterator[None]:
    """Inside, no print fails because its reader has left: ``left`` is called, and what is printed
    there from then on is dropped. Whatever prints is covered, libraries and their bars too.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (  # None where there is none, as in a program without prepare()
        stream and cast(TextIO, _OutlivingStream(stream, left)) for stream in streams
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _OutlivingStream:
    """A stream whose methods that write outlive its reader; all else is the stream's own."""

    def __init__(self, stream: TextIO, left: Callable[[], None]) -> None:
        self._stream, self._left = stream, left

    def write(self, text: str) -> int:
        with self._outliving():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        with self._outliving():
            self._stream.writelines(lines)

    def flush(self) -> None:
        with self._outliving():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _outliving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not reader_has_left(error):
                raise
            _drop([descriptor for descriptor in (1, 2) if _is_unread(descriptor)])
            self._left()
