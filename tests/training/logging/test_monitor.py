"""Records of a run: readable while it runs, and without duplicates after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaegpt.config import LoggingConfig, ModelConfig, RunConfig
from megaegpt.errors import DataError
from megaegpt.evaluation.text_loss import Evaluation
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.logging import monitor as monitor_module
from megaegpt.training.logging.monitor import Monitor
from tests.tiny.runs import records

EVALUATION = Evaluation(loss=3.0, nats_per_byte=0.9, tokens=100, loss_by_chunk=(3.5, 2.5, math.nan))


def monitor(folder: Path, done: int = 0, tensorboard: bool = False) -> Monitor:
    config = LoggingConfig(directory=str(folder), tensorboard=tensorboard)
    return Monitor(config, ProcessGrid(), done)


def test_records_after_the_checkpoint_are_dropped_when_a_run_is_resumed(tmp_path: Path) -> None:
    first = monitor(tmp_path)
    for step in range(1, 6):
        first.training(step, {"loss": 10.0 - step})
        if step == 3:
            first.validation(step, EVALUATION)
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # the process was killed while it wrote
    second = monitor(tmp_path, done=3)
    assert second.judged_value(3) == EVALUATION.loss
    assert second.judged_value(5) is None
    second.training(4, {"loss": 60.0})
    second.close()
    assert [(r["step"], r.get("loss")) for r in records(tmp_path)] == [
        (1, 9.0),
        (2, 8.0),
        (3, 7.0),
        (3, None),
        (4, 60.0),
    ]


def test_a_new_run_in_an_old_folder_starts_its_records_anew(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        run = monitor(tmp_path)
        run.training(1, {"loss": loss})
        run.close()
    assert [r["loss"] for r in records(tmp_path)] == [2.0]


def test_records_are_strict_json(tmp_path: Path) -> None:
    run = monitor(tmp_path)
    run.training(1, {"loss": math.nan, "grad_norm": math.inf, "mfu": None, "lr": 0.1})
    run.validation(1, EVALUATION)
    chunks = (math.inf, 2.5, math.nan)
    run.validation(2, Evaluation(math.nan, math.nan, tokens=100, loss_by_chunk=chunks))
    run.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    training, validation, diverged = (json.loads(line, parse_constant=refuse) for line in lines)
    assert training == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}
    assert validation["validation_loss_by_chunk"] == [3.5, 2.5]
    assert diverged["validation_loss"] is None
    assert diverged["validation_loss_by_chunk"] == [None, 2.5]


@pytest.mark.parametrize("written", ["null", "NaN"])
def test_an_evaluation_without_a_finite_loss_is_not_made_again(
    tmp_path: Path, written: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 2, "validation_loss": {written}}}\n')
    run = monitor(tmp_path, done=2)
    run.close()
    assert math.isnan(run.judged_value(2) or 0.0)
    assert run.judged_value(1) is None


@pytest.mark.parametrize(
    ("written", "shown"), [('"3.5"', '"3.5"'), ("[3.5]", "a list"), ("true", "true"), ("{}", "an")]
)
def test_a_loss_on_record_that_is_no_number_is_one_line(
    tmp_path: Path, written: str, shown: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 2, "validation_loss": {written}}}\n')
    with pytest.raises(DataError) as raised:
        monitor(tmp_path, done=2)
    assert f"{tmp_path}/metrics.jsonl, the evaluation after step 2, is damaged: " in str(
        raised.value
    )
    assert f"validation_loss must be a number, not {shown}" in str(raised.value)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "a")  # noqa: SIM115
    monkeypatch.setattr(monitor_module, "open", lambda *_, **__: full, raising=False)
    run = monitor(tmp_path)
    run.training(1, {"loss": 4.0})
    with pytest.raises(DataError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        run.flush()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/run: Not a directory"):
        monitor(tmp_path / "file" / "run")


def test_tensorboard_has_scalars_texts_and_the_figure(tmp_path: Path) -> None:
    run = monitor(tmp_path, tensorboard=True)
    run.training(1, {"loss": 4.0, "lr": 0.5})
    run.validation(1, EVALUATION)
    run.configuration(RunConfig(model=ModelConfig(kind="egpt")))
    run.text("sample", "once upon\na time", 1)
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("training/loss")] == [4.0]
    assert [e.value for e in events.Scalars("validation/loss")] == [3.0]
    assert [e.value for e in events.Scalars("validation_by_chunk/01")] == [2.5]
    (text,) = events.Tensors("config/text_summary")
    assert b"kind: egpt" in text.tensor_proto.string_val[0]
    (text,) = events.Tensors("sample/text_summary")
    assert text.step == 1
    assert b"    once upon\n    a time" in text.tensor_proto.string_val[0]


def test_the_loss_by_chunk_is_drawn_where_matplotlib_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = monitor(tmp_path, tensorboard=True)
    run.validation(1, EVALUATION)
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["validation/loss_by_chunk"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = Monitor(LoggingConfig(directory=str(tmp_path)), ProcessGrid(dp_rank=1, dp_size=2))
    other.training(1, {"loss": 4.0})
    other.validation(1, EVALUATION)
    other.configuration(RunConfig())
    other.text("sample", "words", 1)
    other.flush()
    other.close()
    assert not list(tmp_path.iterdir())
