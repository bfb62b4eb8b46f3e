"""Reading runs back, and what differs between them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megaegpt.errors import DataError
from megaegpt.report.runs import config_differences, read_run, read_runs


def make_run(folder: Path, records: list[dict[str, object]], steps: int = 30) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"training: {{steps: {steps}, global_batch_size: 2}}\nmodel: {{max_seq_len: 8}}\n"
        f"logging: {{directory: {folder}}}\n"
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


RECORDS: list[dict[str, object]] = [
    {"step": 1, "loss": 5.0, "lr": 0.1},
    {"step": 2, "loss": 4.0, "lr": 0.1, "tokens_per_second": 10.0},
    {"step": 2, "validation_loss": 3.0, "validation_nats_per_byte": 1.0},
    {"step": 3, "loss": 3.0},
    {"step": 3, "validation_loss": 3.5, "validation_nats_per_byte": 1.1},
]


def test_curves_and_evaluations_of_a_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "small", RECORDS))
    assert (run.name, run.steps) == ("small", 3)
    assert run.curve("loss") == ([1, 2, 3], [5.0, 4.0, 3.0])
    assert run.curve("tokens_per_second") == ([2], [10.0])
    assert run.last_validation() == RECORDS[4]
    assert run.best_validation() == RECORDS[2]


def test_tokens_seen_are_those_of_samples_that_are_not_all_full(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "earlier", RECORDS)).tokens_before(3) == 3 * 2 * 8
    told: list[dict[str, object]] = [{"step": 2, "loss": 4.0, "tokens_per_sample": 2.25}]
    run = read_run(make_run(tmp_path / "rows", [*RECORDS, *told]))
    assert [run.tokens_before(step) for step in (0, 2, 3)] == [0, 9, 14]


def test_tokens_seen_are_those_on_record_whatever_the_configuration_is_by_now(
    tmp_path: Path,
) -> None:
    """A run that went on with another batch has left its last configuration alone."""
    told: list[dict[str, object]] = [
        {"step": step, "loss": 3.0, "tokens_seen": tokens}
        for step, tokens in ((1, 64), (2, 128), (3, 144))
    ]
    validation: dict[str, object] = {"step": 5, "validation_loss": 3.0}  # ahead of its steps
    run = read_run(make_run(tmp_path / "run", [*told, validation]))
    assert [run.tokens_before(step) for step in (0, 1, 2, 3, 5)] == [0, 64, 128, 144, 144 + 2 * 16]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "running", RECORDS)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert read_run(folder).steps == 3


def test_a_folder_that_is_no_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such run: give the folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(DataError, match=f"{tmp_path}: this folder is no run's: it has no config"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": 2, "lo', "[]", "null", '{"loss": 1}', "\xff\x00", "", "[" * 9000, "9" * 5000),
        *('{"step": 2, "loss": "x"}', '{"step": 2, "loss": [1]}', '{"step": 2, "lr": true}'),
        *('{"step": null}', '{"step": true}', '{"step": 1e3}', '{"step": 9223372036854775808}'),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path / "bad", RECORDS[:1])
    with open(folder / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write(line + '\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(DataError, match=r"bad/metrics\.jsonl:2 is"):
        read_run(folder)


def test_a_run_that_diverged_is_read_in_the_form_of_today_and_of_earlier_versions(
    tmp_path: Path,
) -> None:
    for number in ("null", "NaN", "Infinity"):
        folder = make_run(tmp_path / number, RECORDS)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(
                f'{{"step": 4, "loss": {number}}}\n{{"step": 4, "validation_loss": {number}, '
            )
            file.write(f'"validation_loss_by_chunk": [2.5, {number}]}}\n')
        run = read_run(folder)
        assert run.finite("loss") == [5.0, 4.0, 3.0]
        assert math.isnan(run.curve("loss")[1][-1])
        assert run.best_validation() == RECORDS[2]
        last = run.last_validation()
        assert last is not None
        assert math.isnan(last["validation_loss"])
        assert last["validation_loss_by_chunk"][0] == 2.5


def test_runs_of_the_same_name_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / kind / "seed1", RECORDS) for kind in ("egpt", "deepgpt")]
    assert [run.name for run in read_runs(folders)] == ["egpt/seed1", "deepgpt/seed1"]
    with pytest.raises(DataError, match="is given twice"):
        read_runs([folders[0], folders[0] / ".." / "seed1"])


def test_only_what_differs_between_configurations_is_shown(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / str(n), RECORDS, steps=n) for n in (30, 40)])
    assert config_differences(runs) == {"training.steps": ["30", "40"]}
