"""Files and folders that appear whole or not at all, on any file system; locks that do not outlive
their holders."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaegpt import files
from megaegpt.errors import CheckpointError, DataError
from megaegpt.files import (
    LFS_POINTER,
    LOCK,
    MissingFeatureWarning,
    check_regular,
    check_tensor_file,
    is_lfs_pointer,
    is_same_file,
    is_special,
    locked_folder,
    option_against_locks,
    sha256_of_file,
    sync_folder,
    whole_file,
    whole_folder,
    write_whole,
)

_HOLDER = """
import subprocess, sys
from pathlib import Path
from megaegpt.files import locked_folder
with locked_folder(Path(sys.argv[1])) as lock:
    if len(sys.argv) > 2:  # a child that has the descriptor too
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock], stdout=subprocess.DEVNULL)
        print(child.pid, flush=True)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def no_mask() -> Iterator[None]:
    """Files are what their group and others may read."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def hold(
    folder: Path, *more: str, program: str = _HOLDER
) -> tuple[subprocess.Popen[str], list[str]]:
    """A process that has locked the folder, and what it has printed until then."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    printed = [process.stdout.readline().strip()]
    while printed[-1] != "locked":
        assert printed[-1], "the process ended without the lock"
        printed.append(process.stdout.readline().strip())
    return process, printed[:-1]


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def test_a_file_appears_whole_with_the_permissions_of_the_umask(
    tmp_path: Path, no_mask: None
) -> None:
    path = tmp_path / "a.json"
    with whole_file(path) as temporary:
        temporary.write_bytes(b"content")
        temporary.chmod(0o600)
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_file_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    write_whole(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*a\.json: No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_through_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert is_special(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"through")
    reader.join(10)
    assert received == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_written_through_and_stays_a_device(tmp_path: Path) -> None:
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"cannot write .*full: No space left on device"):
        write_whole(link, b"content")
    assert link.is_symlink()
    assert list(tmp_path.iterdir()) == [link]
    write_whole(Path(os.devnull), b"content")
    assert is_special(Path(os.devnull))
    assert not is_special(tmp_path)
    assert not is_special(tmp_path / "nothing")


def test_a_folder_appears_whole_with_the_permissions_of_the_umask(
    tmp_path: Path, no_mask: None
) -> None:
    folder = tmp_path / "deeper" / "weights"
    with whole_folder(folder) as temporary:
        (temporary / "a").write_bytes(b"content")
        (temporary / "a").chmod(0o600)
        assert not folder.exists()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o644
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failed_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt

    def fail() -> None:
        with whole_folder(tmp_path / "weights") as temporary:
            (temporary / "a").write_bytes(b"half")
            raise error

    with pytest.raises(expected):
        fail()
    assert list(tmp_path.iterdir()) == []


_WRITER = """
import sys
from pathlib import Path
from megaegpt.files import whole_folder
with whole_folder(Path(sys.argv[1])) as temporary:
    (temporary / "a").write_bytes(b"half")
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_of_a_folder_is_removed_and_of_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "weights"
    ours = tmp_path / ".weights.old"  # somebody's, with a lock that nobody holds
    ours.mkdir()
    (ours / ".lock").touch()
    process, _ = hold(folder, program=_WRITER)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder):
        raise KeyboardInterrupt
    (left,) = set(tmp_path.iterdir()) - {ours}
    assert (left / "a").read_bytes() == b"half"
    kill(process)
    with whole_folder(folder) as temporary:
        (temporary / "b").touch()
    assert set(tmp_path.iterdir()) == {ours, folder}
    assert [path.name for path in folder.iterdir()] == ["b"]


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mine").write_bytes(b"mine")
    with (
        pytest.raises(CheckpointError, match="exists already"),
        whole_folder(tmp_path / "weights"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "weights" / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_under_a_link_s_name_is_what_the_link_leads_to(
    tmp_path: Path, is_there: bool
) -> None:
    target = tmp_path / "disk" / "weights"
    if is_there:
        target.mkdir(parents=True)
    (tmp_path / "weights").symlink_to(target)
    with whole_folder(tmp_path / "weights") as temporary:
        (temporary / "a").write_bytes(b"content")
    assert (target / "a").read_bytes() == b"content"
    assert (tmp_path / "weights").readlink() == target
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("name", ["loop", "mounted"])
def test_what_no_folder_can_take_the_place_of_is_refused_before_the_work(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    with (
        pytest.raises(CheckpointError, match=r"exists already|is a mount point: name a folder in"),
        whole_folder(tmp_path / name),
    ):
        pytest.fail("the block must not run")


def test_a_file_system_without_durable_folders_is_said_once_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    with pytest.warns(MissingFeatureWarning, match="no durable folders") as warned:
        sync_folder(tmp_path)
    assert len(warned) == 1


def test_a_folder_that_fails_to_be_synced_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    program = Path(sys.argv[0]).name
    holder = rf"\(process {os.getpid()} on {socket.gethostname()}, {program}\)"
    with locked_folder(tmp_path):
        with (
            pytest.raises(DataError, match=rf"is being written by another run {holder}"),
            locked_folder(tmp_path),
        ):
            pytest.fail("two have the lock")
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with locked_folder(tmp_path):
        pass


def test_a_lock_ends_with_its_killed_holder(tmp_path: Path) -> None:
    process, _ = hold(tmp_path)
    with (
        pytest.raises(DataError, match=rf"another run \(process {process.pid} on "),
        locked_folder(tmp_path),
    ):
        pytest.fail("two have the lock")
    kill(process)
    assert (tmp_path / LOCK).exists()  # what it leaves blocks nobody
    with locked_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_stays_while_a_child_of_its_holder_has_it(tmp_path: Path) -> None:
    process, [child] = hold(tmp_path, "with a child")
    kill(process)
    with pytest.raises(DataError, match="another run"), locked_folder(tmp_path):
        pytest.fail("two have the lock")
    os.kill(int(child), signal.SIGKILL)
    for _ in range(1000):  # until the system has closed its files
        try:
            with locked_folder(tmp_path):
                return
        except DataError:
            threading.Event().wait(0.01)
    pytest.fail("the lock outlives every process that had it")


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"pid": 1}'])
def test_a_lock_file_without_a_holder_blocks_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with locked_folder(tmp_path):
        pass


def test_a_file_system_without_locks_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(MissingFeatureWarning, match="has no locks"), locked_folder(tmp_path) as lock:
        os.fstat(lock)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"cannot write .*nowhere/\.lock: No such file"),
        locked_folder(tmp_path / "nowhere"),
    ):
        pytest.fail("there is no folder to lock")


def test_a_git_lfs_pointer_is_known(tmp_path: Path) -> None:
    (tmp_path / "pointer").write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 5\n")
    (tmp_path / "text").write_bytes(b"version https://example.org")
    assert is_lfs_pointer(tmp_path / "pointer")
    assert not is_lfs_pointer(tmp_path / "text")
    assert "git lfs pull" in files.LFS_POINTER_MESSAGE


def test_what_is_no_file_of_bytes_that_ends_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "text").write_text("a")
    check_regular(tmp_path / "text")
    check_tensor_file(tmp_path / "text")
    check_tensor_file(tmp_path / "missing")
    with pytest.raises(ValueError, match="a folder"):
        check_regular(tmp_path)
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match="no regular file"):
            check_regular(tmp_path / name)
        with pytest.raises(OSError, match="no regular file"):
            sha256_of_file(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is no regular file"):
            check_tensor_file(tmp_path / name)


def test_a_lock_file_that_goes_while_it_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS: another machine's holder ends between the open and the lock."""
    lock, calls = fcntl.flock, []

    def stale_once(handle: int, kind: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        lock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", stale_once)
    with locked_folder(tmp_path):
        assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none,addr=1.2.3.4", None),
        ("nfs", "rw,vers=3,nolock,local_lock=all", "local_lock=all"),
        ("nfs", "rw,local_lock=flock", "local_lock=flock"),
        ("nfs", "rw,local_lock=posix", None),
        ("ext4", "rw,nolock", None),
    ],
)
def test_a_mount_that_keeps_locks_to_itself_is_known(
    tmp_path: Path, kind: str, options: str, found: str | None
) -> None:
    number = tmp_path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 27 0:999 / /proc rw,relatime - proc proc rw\n"
        f"90 27 {device} / /data rw,relatime shared:1 - {kind} server:/data {options}\n"
    )
    assert option_against_locks(tmp_path, mounts) == found
    assert option_against_locks(tmp_path) is None  # as it is here
    assert option_against_locks(tmp_path, tmp_path / "nowhere") is None


def test_a_file_is_known_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to("b")
    assert is_same_file(tmp_path / "a", tmp_path / "c")
    for other in (tmp_path, tmp_path / "none", None, "\0"):
        assert not is_same_file(tmp_path / "a", other)
