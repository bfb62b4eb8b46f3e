"""A run that goes on with another batch or context length takes up its data where it left off, and
counts what it has seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaegpt.config import BatchRampConfig, BatchSchedule
from megaegpt.config.run import RunConfig
from megaegpt.data.tokens.batch import Arrays
from megaegpt.data.tokens.samples import Samples
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.report.runs import read_run
from megaegpt.text_tables import short_count
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.checkpoint.reshaping import reshape
from megaegpt.training.consumption import Consumption
from megaegpt.training.pretraining import train
from megaegpt.training.run_data import PretrainingData, RunData
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import CHUNK, CHUNKS, StopAfter, corpus, losses, records, run_config

__all__ = ["corpus"]

RAMP = BatchRampConfig(start=2, increment=2, steps=3)


def _saved(consumption: Consumption, step: int) -> dict[str, Any]:
    """The entries of a checkpoint, as they come back from its manifest."""
    state: dict[str, Any] = json.loads(json.dumps({"step": step, **consumption.state(step)}))
    return state


@pytest.mark.parametrize("tokens_per_sample", [8, 1000 / 7])
@pytest.mark.parametrize("batches", [BatchSchedule(8), BatchSchedule(8, RAMP)])
def test_an_unchanged_run_goes_on_by_its_schedule_to_the_bit(
    batches: BatchSchedule, tokens_per_sample: float
) -> None:
    straight = Consumption(batches, tokens_per_sample)
    for step in (0, 5, 1234):
        assert Consumption.restored(batches, tokens_per_sample, _saved(straight, step)) == straight


def test_a_checkpoint_of_an_earlier_version_goes_on_by_the_schedule() -> None:
    state = {"step": 7, "global_batch_size": 16}
    restored = Consumption.restored(BatchSchedule(8), 4, state)
    assert restored == Consumption(BatchSchedule(8), 4)
    identity = {"global_batch_size": 8, "batch_ramp": None}
    assert restored.notices(state, identity) == []


def test_one_change_after_the_other_leaves_no_sample_out_and_none_twice() -> None:
    """Back to the first batch too; and each checkpoint before is gone on from as it was."""
    schedules = [BatchSchedule(16), BatchSchedule(4, RAMP), BatchSchedule(32), BatchSchedule(16)]
    consumption, seen = Consumption(schedules[0], 10), 0
    states: list[dict[str, Any]] = []
    for number, batches in enumerate(schedules):
        step = 4 * number
        if number:
            consumption = Consumption.restored(batches, 10, states[-1])
        for after in range(step, step + 4):
            assert consumption.batches.samples_before(after) == seen
            assert consumption.tokens(after) == 10 * seen
            seen += batches.size(after)
        states.append(_saved(consumption, step + 4))
    back = Consumption.restored(BatchSchedule(2), 10, states[0])
    assert [back.batches.samples_before(step) for step in (4, 5)] == [64, 66]


def test_samples_of_another_length_are_taken_from_behind_as_many_tokens() -> None:
    state = _saved(Consumption(BatchSchedule(8), 16), 5)  # 640 tokens
    longer = Consumption.restored(BatchSchedule(8), 48, state)
    assert longer.batches.samples_before(5) == 14  # 13 and a third
    assert [longer.tokens(step) for step in (5, 6)] == [640, 640 + 8 * 48]
    (notice,) = longer.notices(state, {"global_batch_size": 8, "batch_ramp": None})
    assert "samples have 48 tokens, where they had 16" in notice
    assert "behind as many tokens as were seen, at sample 14" in notice
    again = Consumption.restored(BatchSchedule(8), 16, _saved(longer, 6))
    assert (again.batches.samples_before(6), again.tokens(6)) == (64, 1024)


# -- whole runs ------------------------------------------------------------------------------------


class _Recorded:
    """Samples that remember which numbers were drawn."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.steps: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, numbers: np.ndarray) -> Arrays:
        self.steps.append(numbers.tolist())
        return self._samples.batch(numbers)


def _train(config: RunConfig, stop_after: int, resume: bool = False) -> tuple[list[int], str]:
    """So many steps of a run: numbers of this rank's samples, and what was shown."""
    found: list[_Recorded] = []

    def read(config: RunConfig) -> RunData:
        data = PretrainingData(config)
        found.append(_Recorded(data.samples))
        data.samples = found[-1]
        return data

    shown = io.StringIO()
    grid = grid_for(1, config.parallel.context_parallel_size)
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        train(config, grid, read, resume=resume, stops=StopAfter(stop_after))
    drawn = [number for step in found[0].steps[:stop_after] for number in step]
    return drawn, shown.getvalue()


def _with_batch(config: RunConfig, size: int, **changes: Any) -> RunConfig:
    training = dataclasses.replace(config.training, global_batch_size=size, **changes)
    return dataclasses.replace(config, training=training)


def _config(kind: str, corpus: Path, folder: Path, **sections: Any) -> RunConfig:
    config = run_config(kind, corpus, folder, **sections)
    return _with_batch(config, 8, steps=9, micro_batch_size=1, eval_interval=2)


def _of_all(results: list[tuple[list[int], str]]) -> list[int]:
    return sorted(number for drawn, _ in results for number in drawn)


@pytest.mark.parametrize(("kind", "cp_size"), [("gpt", 1), ("gpt", 2), ("egpt", 1)])
def test_a_run_with_another_batch_goes_on_with_the_next_sample_and_counts_what_it_saw(
    corpus: Path, tmp_path: Path, distributed: Distributed, kind: str, cp_size: int
) -> None:
    config = _config(kind, corpus, tmp_path)
    smaller = dataclasses.replace(
        _with_batch(config, 4),
        parallel=dataclasses.replace(config.parallel, context_parallel_size=cp_size),
    )
    ramped = _with_batch(config, 16, batch_ramp=BatchRampConfig(start=12, increment=2, steps=4))
    first = distributed(1, _train, config, 3)
    second = distributed(2, _train, smaller, 3, True)
    third = distributed(1, _train, ramped, 3, True)
    assert _of_all(first) == list(range(24))
    assert _of_all(second) == [n for n in range(24, 36) for _ in range(cp_size)]
    assert _of_all(third) == list(range(36, 36 + 14 + 14 + 16))
    notice = "notice: the data goes on behind the 24 samples that were drawn\n"
    assert notice in second[0][1]
    length = CHUNK if kind == "gpt" else CHUNK * CHUNKS
    seen = np.array([0, 8, 16, 24, 28, 32, 36, 50, 64, 80]) * length
    told = {r["step"]: r["tokens_seen"] for r in records(tmp_path) if "loss" in r}
    assert told == dict(enumerate(seen[1:].tolist(), 1))
    run = read_run(tmp_path)
    assert [run.tokens_before(step) for step in range(10)] == seen.tolist()
    whole = 24 + 6 * 4  # samples of all steps, had the second batch stayed
    epochs = whole / len(PretrainingData(config).samples)
    assert f"; the run is {epochs:.2f} epochs" in second[0][1]
    assert f"9 steps, {short_count(whole * length)} tokens" in second[0][1]


def test_a_checkpoint_that_was_reshaped_or_gone_back_to_keeps_its_place_in_the_data(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    config = _config("gpt", corpus, tmp_path)
    checkpoints = tmp_path / "checkpoints"
    distributed(1, _train, config, 3)
    distributed(1, _train, _with_batch(config, 2), 3, True)
    (reshaped,) = distributed(1, _reshape, checkpoints / "step_00000006", tmp_path / "reshaped")
    kept = Manifest.read(reshaped).trainer
    assert (kept["samples"], kept["tokens"]) == (30, 30 * CHUNK)
    (checkpoints / "latest").write_text("step_00000003")
    ((drawn, _),) = distributed(1, _train, _with_batch(config, 4), 2, True)
    assert sorted(drawn) == list(range(24, 32))
    assert records(tmp_path)[-1]["tokens_seen"] == 32 * CHUNK


def _reshape(checkpoint: Path, output: Path) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        return reshape(checkpoint, output, grid_for(1))


def test_a_resumed_blend_goes_on_with_the_next_sample_of_its_corpora(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    data = {"train": (f"{corpus}/train", f"{corpus}/validation"), "weights": (3.0, 1.0)}
    config = _config("gpt", corpus, tmp_path, data=data)
    distributed(1, _blended, config, 3, False)
    distributed(1, _blended, _with_batch(config, 2), 4, True)
    last = [r for r in records(tmp_path) if f"tokens/{corpus}/train" in r][-1]
    counted = sum(last[f"tokens/{corpus}/{split}"] for split in ("train", "validation"))
    assert counted == last["tokens_seen"] == (3 * 8 + 4 * 2) * CHUNK


def _blended(config: RunConfig, stop_after: int, resume: bool) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stops = StopAfter(stop_after)
        train(config, ProcessGrid(), PretrainingData, resume=resume, stops=stops)


def test_a_longer_context_goes_on_behind_the_tokens_that_were_seen(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    rotary = {"positions": "rotary", "dropout": 0.0}
    config = _config("gpt", corpus, tmp_path, model=rotary)
    longer = _config("gpt", corpus, tmp_path, model={**rotary, "max_seq_len": 2 * CHUNK})
    distributed(1, _train, config, 3)
    ((drawn, shown),) = distributed(1, _train, longer, 2, True)
    assert sorted(drawn) == list(range(12, 28))
    assert "notice: samples have 16 tokens, where they had 8" in shown
    run = read_run(tmp_path)
    assert [run.tokens_before(step) for step in (2, 3, 5)] == [128, 192, 192 + 16 * 16]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]
