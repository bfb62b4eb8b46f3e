"""What counts as a request to stop, besides the signals and limits that whole runs are ended by."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaegpt import environment
from megaegpt.bars import progress_bar
from megaegpt.config import LoggingConfig
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.logging.monitor import Monitor
from megaegpt.training.stopping import StopRequests


def _reason(stops: StopRequests) -> str | None:
    stops.ask(False, ProcessGrid())
    return stops.answer()[1]


class _Failing(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def write(self, text: str) -> int:
        raise OSError(self._number, "as the operating system says")


@contextlib.contextmanager
def _failing_to_write(number: int) -> Iterator[None]:
    stream = _Failing(number)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


@pytest.mark.parametrize("what", ["line", "bar"])
def test_a_reader_that_leaves_is_a_request_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(environment, "reader_has_left", lambda error: True)
    monitor = Monitor(LoggingConfig(directory=str(tmp_path), tensorboard=False), ProcessGrid())
    with _failing_to_write(errno.EPIPE), StopRequests() as stops:
        assert _reason(stops) is None
        if what == "line":
            monitor.log("step 1")
        else:
            bar = progress_bar(total=2)
            bar.start_t = bar.last_print_t = bar.last_print_t - 31.0  # drawn in files too
            bar.update(2)
        assert (_reason(stops), stops.unread) == ("SIGPIPE", True)
    monitor.close()


def test_a_line_for_a_full_disk_is_an_error(tmp_path: Path) -> None:
    monitor = Monitor(LoggingConfig(directory=str(tmp_path), tensorboard=False), ProcessGrid())
    with (
        _failing_to_write(errno.ENOSPC),
        StopRequests(),
        pytest.raises(OSError, match="as the operating system says"),
    ):
        monitor.log("step 1")
    monitor.close()
