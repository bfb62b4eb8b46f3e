"""A bar is drawn often on a terminal, and seldom in a file."""

from __future__ import annotations

import sys
import time

import pytest

from megaegpt import bars
from megaegpt.bars import progress_bar, telling_if_slow


@pytest.mark.parametrize(("terminal", "drawn"), [(True, 2), (False, 0)])
def test_a_log_is_not_filled_with_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, drawn: int
) -> None:
    """One step of the work, after a second, is shown at once on a terminal alone."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: terminal, raising=False)
    bar = progress_bar(total=10, title="pages")
    bar.start_t = bar.last_print_t = bar.last_print_t - 1.0
    bar.update(1)
    assert capsys.readouterr().err.count("pages") == drawn
    bar.close()


@pytest.mark.parametrize("leave", [True, False])
def test_a_bar_in_a_file_ends_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], leave: bool
) -> None:
    """Whether it stays on a terminal or not: what follows is not written behind it."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: False, raising=False)
    bar = progress_bar(total=2, title="pages", leave=leave)
    bar.start_t = bar.last_print_t = bar.last_print_t - 31.0
    bar.update(2)
    bar.close()
    error = capsys.readouterr().err
    assert "pages: 100%" in error
    assert error.endswith("\n")


def test_only_slow_work_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with telling_if_slow("loading a ..."):
        pass
    monkeypatch.setattr(bars, "SILENT_S", 0.0)
    with telling_if_slow("loading b ..."):
        time.sleep(0.05)
    assert capsys.readouterr().err == "loading b ...\n"
