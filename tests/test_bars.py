"""A bar is drawn often on a terminal, and seldom in a file."""

from __future__ import annotations

import sys

import pytest

from megaegpt.bars import progress_bar


@pytest.mark.parametrize(("terminal", "drawn"), [(True, 2), (False, 1)])
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
