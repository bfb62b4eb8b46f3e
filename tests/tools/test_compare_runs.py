"""The table of validation losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaegpt.errors import DataError
from megaegpt.report.runs import read_runs
from tools.compare_runs import compare


def make_run(folder: Path, kind: str, losses: list[float], chunks: list[float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"model: {{kind: {kind}, max_seq_len: 8, encoder: {{source: x}}, "
        "egpt: {num_chunks: 2, chunk_size: 4}}\n"
        "training: {steps: 30, global_batch_size: 2}\n"
    )
    records: list[dict[str, object]] = []
    for number, loss in enumerate(losses, 1):
        records.append({"step": 10 * number, "loss": 9.0})
        validation = {"validation_loss": loss, "validation_nats_per_byte": loss / 4}
        by_chunk = {"validation_loss_by_chunk": chunks} if chunks else {}
        records.append({"step": 10 * number, **validation, **by_chunk})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_the_last_validation_of_each_run_is_shown_and_chunks_where_there_are_some(tmp_path):
    runs = [
        make_run(tmp_path / "encoder", "gpt", [6.0, 5.0], []),
        make_run(tmp_path / "small", "egpt", [4.0], [4.25, 3.75]),
    ]
    lines = compare(read_runs(runs)).splitlines()
    assert lines[0].split("  ")[-1].strip() == "perplexity"
    assert lines[2].split() == ["encoder", "gpt", "20", "320", "5.0000", "1.2500", "148.4"]
    assert lines[3].split() == ["small", "egpt", "10", "160", "4.0000", "1.0000", "54.6"]
    assert [line.split() for line in lines[-3:]] == [
        ["chunk", "0", "1"],
        ["-----", "-----", "-----"],
        ["small", "4.250", "3.750"],
    ]
    assert "encoder" not in "".join(lines[5:])


def test_a_run_without_an_evaluation_is_named(tmp_path):
    run = make_run(tmp_path / "new", "gpt", [], [])
    with pytest.raises(DataError, match="new was not evaluated yet"):
        compare(read_runs([run]))


def test_a_folder_that_is_no_run_is_named(tmp_path):
    run = make_run(tmp_path / "other", "gpt", [1.0], [])
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"other: no metrics\.jsonl"):
        read_runs([run])


def test_a_run_that_diverged_is_compared_beside_the_others(tmp_path):
    good = make_run(tmp_path / "good", "gpt", [5.0], [])
    bad = make_run(tmp_path / "bad", "gpt", [float("nan")], [float("nan"), 1.0])
    lines = compare(read_runs([good, bad])).splitlines()
    assert lines[2].split()[4] == "5.0000"
    assert lines[3].split() == ["bad", "gpt", "10", "160", "nan", "nan", "nan"]
    assert lines[-1].split() == ["bad", "nan", "1.000"]


def test_a_run_without_an_evaluation_keeps_no_other_from_being_compared(tmp_path):
    good = make_run(tmp_path / "good", "gpt", [5.0], [])
    new = make_run(tmp_path / "new", "egpt", [], [])
    lines = compare(read_runs([new, good])).splitlines()
    assert lines[2].split() == ["new", "egpt", *["-"] * 5]
    assert lines[3].split()[4] == "5.0000"


def test_tokens_seen_are_those_on_record_for_the_samples(tmp_path):
    rows = make_run(tmp_path / "rows", "gpt", [5.0], [])
    with open(rows / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 10, "loss": 9.0, "tokens_per_sample": 4.5}) + "\n")
    assert compare(read_runs([rows])).splitlines()[2].split()[2:4] == ["10", "90"]
