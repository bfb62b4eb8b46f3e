"""What is wrong around a program is one line, whatever library met it; the rest is a bug."""

from __future__ import annotations

import errno
import getpass
import io
import os
import pty
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from megaegpt import environment
from megaegpt.environment import cause_of
from megaegpt.errors import DataError, LaunchError, exits_cleanly

_EXPECTED = [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free some"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "x.bin"), "x.bin: Disk quota exceeded: free"),
    (OSError(errno.EROFS, "Read-only file system", "x"), "x: Read-only file system: write to"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied: see who"),
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files: raise the limit: `ulimit"),
    (OSError(errno.EADDRINUSE, "Address already in use"), "--master_port"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x: Is a directory"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"x"), "x: Not a directory"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5), "xxxxx: File name too long"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "x: No such file"),
    (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in []"), "set TMPDIR"),
    (ValueError("embedded null byte"), "NUL character"),
    (MemoryError(), "out of memory: lower the batch"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"), "2 GiB)"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "out of mem"),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "free"),
    (RuntimeError("can't start new thread"), "ulimit -u"),
    (RuntimeError("[enforce fail at socket.cc:24] rv != -1. Too many open files"), "-n 6"),
    (RuntimeError("[enforce fail at f.cc:1] No space left on device"), "left on device: free"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on dev"),
    (RuntimeError("Could not determine home directory."), "set HOME"),
    (ModuleNotFoundError("No module named 'no_such'", name="no_such.part"), "package no_such is"),
]


@pytest.mark.parametrize(("error", "told"), _EXPECTED, ids=lambda value: str(value)[:30])
def test_what_the_surroundings_cause_is_one_line(error: Exception, told: str) -> None:
    cause = cause_of(error)
    assert cause is not None
    assert told in cause
    assert "\n" not in cause


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("name"),
        OSError("a text of a library"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        OSError(errno.EBADF, "Bad file descriptor"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ModuleNotFoundError("No module named 'torch.no_such'", name="torch.no_such"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert cause_of(error) is None

    @exits_cleanly
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        main()


def test_the_rank_is_part_of_the_line() -> None:
    error = MemoryError()
    error.add_note("on rank 3 of 8, node-01")
    assert str(cause_of(error)).endswith("(on rank 3 of 8, node-01)")


def test_the_line_goes_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    @exits_cleanly
    def main() -> None:
        Path("/proc/none").mkdir()

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: /proc/none: No such file or directory\n")


@pytest.mark.parametrize(("rank", "local_rank", "shown"), [(0, 0, 1), (3, 1, 0), (2, 0, 1)])
def test_what_ails_a_whole_machine_is_told_by_its_first_rank(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    local_rank: int,
    shown: int,
) -> None:
    """The machine need not be that of rank 0, which would not know of it."""
    launched = {"WORLD_SIZE": 4, "MASTER_ADDR": "node-01", "MASTER_PORT": 29500}
    for name, value in {**launched, "RANK": rank, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    @exits_cleanly
    def program() -> None:
        error = LaunchError("no GPU here")
        error.on_whole_machine = True
        raise error

    with pytest.raises(SystemExit) as ended:
        program()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("no GPU here") == shown


def test_a_working_directory_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError) as raised:
        os.getcwd()
    assert "working directory" in str(cause_of(raised.value))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    @exits_cleanly
    def main() -> None:
        print("naïve → 🙂 \udcff")  # the last as in a path that is not UTF-8
        raise DataError("→ \udcff")

    with pytest.raises(SystemExit):
        main()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    assert out.startswith("na")
    assert out.endswith("\\udcff\n")
    assert err.startswith("error: ")


def test_a_user_without_an_entry_has_a_name_and_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", missing)
    monkeypatch.setattr(environment.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    environment.prepare()
    assert getpass.getuser() == f"user{os.getuid()}"
    assert Path.home() == tmp_path / f"home-of-user{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700


_PRINTING = """
import sys
import time
from megaegpt.errors import exits_cleanly

@exits_cleanly
def main():
    for number in range(int(sys.argv[1])):
        print("line", number)

main()
"""


@pytest.mark.parametrize("lines", ["3", "100000"])
def test_a_reader_that_leaves_ends_a_program_quietly(lines: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", _PRINTING, lines]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


_OUTLIVING = """
import sys
from megaegpt import environment

with environment.outliving_readers(lambda: print("left", file=sys.stderr)):
    for number in range(100):
        print("line", number, flush=True)
print("end")
"""


@pytest.mark.parametrize("reader", ["pipe", "terminal"])
def test_a_reader_that_leaves_may_be_outlived(reader: str) -> None:
    """It is told once; of the streams the other one stays."""
    reading, writing = os.pipe() if reader == "pipe" else pty.openpty()
    os.close(reading)
    command = [sys.executable, "-c", _OUTLIVING]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"left\n")


def test_output_to_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", _PRINTING, "3"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: No space left on device")
    assert done.stderr.count(b"\n") == 1


def test_closed_streams_are_no_failure() -> None:
    command = ["sh", "-c", 'exec "$0" -c "$1" 3 >&- 2>&-', sys.executable, _PRINTING]
    assert subprocess.run(command, check=False).returncode == 0


_READING = """
import sys
from megaegpt.errors import exits_cleanly

@exits_cleanly
def main():
    assert (sys.stdin.fileno(), sys.stdin.isatty()) == (0, False)
    assert (sys.stdin.read(), sys.stdin.buffer.read()) == ("", b"")
    assert sys.stdout.fileno() == 1

main()
"""


def test_a_closed_input_is_one_without_content() -> None:
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, _READING]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
