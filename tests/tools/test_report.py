"""The page of runs: whole in one file, with every table and figure that the records allow."""

from __future__ import annotations

import base64
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from megaegpt.report.page import render, thinned
from megaegpt.report.runs import read_runs
from tests.report.test_runs import make_run
from tools import report

pytest.importorskip("matplotlib")


def _records(chunks: list[float]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, 5):
        values = {"loss": 5.0 - step, "grad_norm": 1.0, "lr": 0.1, "grad_norm/layer_00": 0.5}
        speed = {"tokens_per_second": 100.0 * step, "memory_gib": 0.25 * step}
        records.append({"step": step, **values, **speed})
    for step, loss in ((2, 1.5), (4, 2.0)):
        validation = {"validation_loss": loss, "validation_nats_per_byte": loss / 4}
        by_chunk = {"validation_loss_by_chunk": chunks} if chunks else {}
        records.append({"step": step, **validation, **by_chunk})
    return records


def _images(page: str) -> dict[str, ElementTree.Element]:
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', page)
    return {caption: ElementTree.fromstring(base64.b64decode(data)) for caption, data in found}


def test_two_runs_are_compared_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_run(tmp_path / "plain", _records([]), steps=30)
    two = make_run(tmp_path / "a<b", _records([4.25, 3.75]), steps=40)
    output = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report", str(one), str(two), "--output", str(output)])
    report.main()
    assert "2 run(s)" in capsys.readouterr().out
    page = output.read_text()
    images = _images(page)
    assert set(images) == {
        "Validation loss",
        "Validation loss by chunk, latest",
        "Training loss",
        "Gradient norm before clipping",
        "Learning rate",
        "Throughput",
        "Peak memory of a rank",
        "Gradient norm by layer: plain",
        "Gradient norm by layer: a&lt;b",
    }
    assert all(image.tag.endswith("svg") for image in images.values())
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in page.split("<tr>")[1:]]
    assert next(row[:8] for row in rows if row[0] == "plain") == [
        "plain",
        "gpt",
        "4 of 30",
        "64",
        "2.5000",
        "2.0000",
        "1.5000 at 2",
        "0.5000",
    ]
    assert ["a&lt;b", "4.250", "3.750"] in rows
    assert ["training.steps", "30", "40"] in rows
    assert "a<b" not in page, "names are text, not markup"
    outside = re.findall(r'(?:src|href)="(?!data:)[^"]*"', page)
    assert outside == [], "nothing is fetched"


def test_tokens_seen_are_those_on_record_for_the_samples(tmp_path: Path) -> None:
    records = [*_records([]), {"step": 4, "loss": 1.0, "tokens_per_sample": 4.5}]
    page = render(read_runs([make_run(tmp_path / "rows", records)]))
    assert "<td>4 of 30</td><td>36</td>" in page


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "one", _records([4.0]))])
    assert render(runs) == render(runs)


def test_a_run_without_evaluations_has_a_page(tmp_path: Path) -> None:
    page = render(read_runs([make_run(tmp_path / "new", [{"step": 1, "loss": 5.0}])]))
    assert "No run was evaluated yet." in page
    assert set(_images(page)) == {"Training loss"}
    page = render(read_runs([make_run(tmp_path / "empty", [])]))
    assert "0 of 30" in page


def test_long_curves_are_thinned_to_means() -> None:
    steps, values = thinned((list(range(4000)), [float(n % 10) for n in range(4000)]))
    assert len(steps) == len(values) == 400
    assert set(values) == {4.5}
    assert steps[0] == 4.5


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    monkeypatch.setattr(sys, "argv", ["report", str(make_run(tmp_path / "one", []))])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    assert "need the package matplotlib: pip install matplotlib" in capsys.readouterr().err


def _write(monkeypatch: pytest.MonkeyPatch, run: Path, output: str) -> int:
    """Call the program; its exit code."""
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--output", output])
    try:
        report.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_device_is_written_to_and_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "one", _records([]))
    assert _write(monkeypatch, run, "/dev/full") == 2
    assert capsys.readouterr().err == "error: cannot write /dev/full: No space left on device\n"
    assert _write(monkeypatch, run, "/dev/null") == 0
    assert all(Path(device).is_char_device() for device in ("/dev/full", "/dev/null"))


def test_an_open_file_of_the_process_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "one", _records([]))
    with open(tmp_path / "page.html", "wb") as page:
        link = tmp_path / "link"  # as /dev/stdout is one
        link.symlink_to(f"/proc/self/fd/{page.fileno()}")
        assert _write(monkeypatch, run, str(link)) == 0
    assert link.is_symlink()
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_the_page_alone_goes_to_standard_output(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    assert _write(monkeypatch, make_run(tmp_path / "one", _records([])), name) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("<!DOCTYPE html>")
    assert shown.endswith("</html>\n")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("page.foo", "--output page.foo: the page is HTML, its name must end in .html"),
        ("", "argument --output: must be the name of a file or folder"),
        ("none/page.html", "cannot write none/page.html: No such file or directory"),
        (".", "cannot write .: Is a directory"),
        (f"{'x' * 300}.html", "File name too long"),
        ("/proc/page.html", "cannot write /proc/page.html: "),
    ],
)
def test_where_no_page_can_be_written_one_line_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    told: str,
) -> None:
    run = make_run(tmp_path / "one", _records([]))
    monkeypatch.chdir(tmp_path)
    assert _write(monkeypatch, run, output) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_run_that_diverged_is_shown_beside_the_others(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", _records([4.0]))
    bad = make_run(tmp_path / "bad", _records([4.0])).rename(tmp_path / "$bad^{_")
    with open(bad / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": null, "tokens_per_second": 1.0, "memory_gib": NaN}\n')
        file.write('{"step": 5, "validation_loss": NaN, "validation_loss_by_chunk": [null, 1]}\n')
    page = render(read_runs([good, bad]))
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in page.split("<tr>")[1:]]
    assert next(row[4:7] for row in rows if row[0] == "good") == ["2.5000", "2.0000", "1.5000 at 2"]
    assert next(row[4:7] for row in rows if row[0] == "$bad^{_") == ["nan", "nan", "1.5000 at 2"]
    assert "Training loss" in _images(page)
