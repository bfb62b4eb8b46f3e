"""Files and folders that appear whole or not at all, their checksums, and locks on folders.

Some file systems (FUSE, object stores, old NFS) have no durable folders, locks or links. What they
lack is said once and done without: a save never fails for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from megaegpt.errors import CheckpointError, DataError, FolderInUseError

TEMPORARY_SUFFIX = ".tmp"

LOCK = ".lock"
"""Name of the file in a folder by which it is locked."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that Git puts in a large file's place."""
LFS_POINTER_MESSAGE = "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"

_UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
    errno.ENOTTY,
    errno.EPERM,
}
"""Error numbers of file systems that do not support a call."""


_LOCAL_LOCKS = {"nolock", "local_lock=flock", "local_lock=all"}
"""Options of NFS by which a machine does not ask the server for locks of this kind."""


class MissingFeatureWarning(UserWarning):
    """A file system lacks something that saves would like to use; Python shows each text once."""


def is_unsupported(error: OSError) -> bool:
    """Whether a file system lacks the call, rather than refuses this one."""
    return error.errno in _UNSUPPORTED


def warn_unsupported(place: Path, lack: str, consequence: str) -> None:
    """Say once what the file system of ``place`` cannot do, and what that means."""
    warnings.warn(
        f"the file system of {place} has no {lack}: {consequence}",
        MissingFeatureWarning,
        stacklevel=2,
    )


def is_lfs_pointer(path: Path) -> bool:
    """Whether Git has put a pointer in this file's place.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def check_regular(path: Path) -> None:
    """Refuse what is no file of bytes that ends: opening a pipe may wait for ever, and a device may
    have no end.

    Raises:
        OSError: there is nothing of this name, or it may not be looked at.
        ValueError: it is a folder, a pipe, a socket or a device; the message says so.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ValueError("it is a folder")
    if not stat.S_ISREG(mode):
        raise ValueError("it is no regular file")


def cache_folder() -> Path:
    """Where what can be made again is kept for this user: ``$MEGAEGPT_CACHE``, else
    ``$XDG_CACHE_HOME/megaegpt``, else ``~/.cache/megaegpt``.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(
        os.environ.get("MEGAEGPT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaegpt"
    )


def check_tensor_file(path: Path) -> None:
    """Refuse what safetensors cannot open, or would never come back from; a file that does not
    exist is left to it.

    Raises:
        CheckpointError: it is no regular file, or its path is not UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{path}: safetensors opens no file whose path is not UTF-8: rename it or its folder"
        ) from None
    try:
        check_regular(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}") from None


def is_same_file(first: str | Path, second: str | Path | None) -> bool:
    """Whether two names, links included, stand for one file that is there."""
    if second is None:
        return False
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False


def sha256_of_file(path: Path) -> str:
    """Checksum of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # there may be no end to it
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


NETWORK_DELAY_S = 60.0
"""How long a machine may not see what another one has written: NFS keeps the list of a folder, and
that a name is not in it, for as long (``acdirmax`` in nfs(5))."""


def wait_for_files(paths: Iterable[Path]) -> None:
    """Wait until this machine sees files that others have published, for :data:`NETWORK_DELAY_S` at
    most: whoever reads them then says what is missing.
    """
    deadline, pause = time.monotonic() + NETWORK_DELAY_S, 0.01
    for path in paths:
        while not path.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # has the folder's list fetched anew
            time.sleep(pause)
            pause = min(2 * pause, 1.0)


# -- writing ---------------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written before it is complete; a rerun reuses the name."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


@contextlib.contextmanager
def naming_failures(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a :class:`DataError` with the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_unsupported(error):
            raise
        warn_unsupported(folder, "durable folders", "what is saved may be lost with the machine")
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a fully written, fsynced file its final name, durably."""
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make ``folder``, and those above it, where they are missing; what was made and is empty when
    the block ends is removed again.

    Raises:
        DataError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with naming_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it
            for path in missing:
                path.rmdir()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place, synced, when the block ends
    well; otherwise nothing is left behind.

    A device, a pipe or a socket is written through and never replaced: the block's file is copied
    into it.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    if path.is_dir() and not path.is_symlink():  # a link is what is replaced, not what it leads to
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())  # some libraries make files for their owner alone
        sync_file(temporary)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file as :func:`whole_file` does.

    Raises:
        DataError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    with naming_failures(path), whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def whole_folder(folder: Path, remedy: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder``, or what a link of this name leads to,
    synced, when the block ends well. What killed processes have left of the same ``folder`` is
    removed before.

    Args:
        remedy: what the user can do where it cannot be written.

    Raises:
        CheckpointError: ``folder`` holds something already or cannot be replaced, or writing failed
            in the block.
    """
    folder = Path(os.path.realpath(folder))  # no folder can take a link's place
    temporary = None
    try:
        is_loop = folder.is_symlink()
        if is_loop or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise CheckpointError(f"{folder} exists already: remove it, or name another folder")
        if os.path.ismount(folder):
            raise CheckpointError(f"{folder} is a mount point: name a folder in it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary = Path(
            tempfile.mkdtemp(TEMPORARY_SUFFIX, prefix=f".{folder.name}.", dir=folder.parent)
        )
        with _in_use(temporary):
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o666 & ~umask())  # safetensors makes them for their owner alone
                sync_file(file)
        temporary.chmod(0o777 & ~umask())
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "" if remedy is None else f"; {remedy}"
        raise CheckpointError(f"{folder} cannot be written: {reason}{hint}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _in_use(temporary: Path) -> Iterator[None]:
    """Keep others from taking a temporary folder for a leftover, as long as this process lives."""
    path = temporary / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # without locks, nobody removes a leftover
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
        path.unlink()
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were killed while they wrote ``folder``: their locks are free. Where a
    mount keeps locks from other machines, they cannot be told from those that still write.
    """
    if option_against_locks(folder.parent) is not None:
        return
    unfinished = f".{glob.escape(folder.name)}.????????{TEMPORARY_SUFFIX}"
    for path in folder.parent.glob(f"{unfinished}/{LOCK}"):
        with contextlib.suppress(OSError):  # it is held, or there are no locks
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(handle)


def is_special(path: Path) -> bool:
    """Whether something is there that is neither a regular file nor a folder, or that is an open
    file under a name of the system (``/dev/fd/3``), which a rename would replace instead.
    """
    try:
        mode = path.stat().st_mode
        link = Path(os.readlink(path)) if path.is_symlink() else path
    except (OSError, ValueError):
        return False
    if Path(os.path.realpath(path.parent)).is_relative_to("/proc") or link.is_relative_to("/proc"):
        return True
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_standard_output(path: Path) -> bool:
    """Whether a name stands for what the program prints to: ``-``, ``/dev/stdout`` and the like."""
    return str(path) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def umask() -> int:
    """The bits that the user wants new files not to have."""
    with contextlib.suppress(OSError):  # Linux tells without changing them for a moment
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE):
            return int(found[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- locks -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[int]:
    """Lock a folder against other runs; gives the lock's file descriptor.

    The lock is one on the file ``.lock`` in it (flock), and the file says who holds it. It lasts
    until every process that has the descriptor has closed it, killed ones included.

    NFS shares it between machines: Linux asks the server for a lock of the whole file, which needs
    the file open for writing, and would not do so for a folder. Two mount options keep locks on one
    machine without a word (``nolock``, and ``local_lock=flock`` or ``all``; see nfs(5)): a mount
    that has one cannot protect against another machine, and says so here.

    Raises:
        FolderInUseError: another process holds it.
        DataError: the folder cannot be written.
    """
    path = folder / LOCK
    handle = _acquire(path)
    try:
        yield handle
    finally:
        with contextlib.suppress(OSError):  # while it is held, nobody else can be at this name
            path.unlink()
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        with naming_failures(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _describe_holder(handle)
            os.close(handle)
            if error.errno == errno.ESTALE:  # over NFS: its holder removed it in between
                continue
            if not isinstance(error, BlockingIOError):
                if not is_unsupported(error):
                    raise DataError(f"cannot lock {path}: {error.strerror or error}") from None
                return _unlocked(path)
            message = f"{path.parent} is being written by another run{holder}"
            raise FolderInUseError(message) from None
        if _is_at(handle, path):
            _sign(handle)
            if (option := option_against_locks(path.parent)) is not None:
                lack = f"locks between machines (it is mounted with {option})"
                warn_unsupported(path.parent, lack, "take care that two do not write into it")
            return handle
        os.close(handle)  # its holder removed it in between: take the new one


def option_against_locks(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The mount option that keeps a folder's locks from other machines; None where there is none.

    Args:
        mounts: the kernel's list, see proc(5).
    """
    with contextlib.suppress(OSError, ValueError):
        device = f"{os.major(number := folder.stat().st_dev)}:{os.minor(number)}"
        for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
            place, _, rest = line.partition(" - ")
            kind, _, *options = rest.split(" ")
            if place.split(" ")[2] == device and kind in ("nfs", "nfs4"):
                found = set(options[-1].split(",")) & _LOCAL_LOCKS
                return min(found, default=None)
    return None


def _unlocked(path: Path) -> int:
    warn_unsupported(path.parent, "locks", "take care that two runs do not write into it")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that the name stands for."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "program": Path(sys.argv[0]).name}
    with contextlib.suppress(OSError):  # a full disk: it holds without a name
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        os.fsync(handle)


def _describe_holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return f" (process {holder['pid']} on {holder['host']}, {holder['program']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
