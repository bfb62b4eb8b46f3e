"""The simulation against runs that others have measured."""

from __future__ import annotations

import pytest

from megaegpt.planning.published import (
    PublishedRun,
    compare_published,
    error_of,
    published_runs,
    simulate_published,
)
from megaegpt.planning.summary import measure_model

_FITTED, _PREDICTED, _UNSEEN = 0.02, 0.08, 0.30
"""Largest errors: of runs by which a constant was chosen, of the others in the same tables, and of
llm-foundry's, which no constant was chosen by."""

_RUNS = published_runs()


def _bound(run: PublishedRun) -> float:
    if run.chose:
        return _FITTED
    return _UNSEEN if run.name.startswith("MPT") else _PREDICTED


def _is_short(run: PublishedRun) -> bool:
    return run.name == "Megatron 32B"


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            run,
            marks=[] if _is_short(run) else pytest.mark.long,
            id=f"{run.name}, {run.gpus} GPUs, {number}",
        )
        for number, run in enumerate(_RUNS)
    ],
)
def test_a_measured_run_is_predicted(run: PublishedRun) -> None:
    assert abs(error_of(run, simulate_published(run))) <= _bound(run)


def test_few_runs_chose_constants_and_most_did_not() -> None:
    chosen = [run.chose for run in _RUNS if run.chose]
    assert len(set(chosen)) == len(chosen) == 4
    assert len(_RUNS) == 28


def test_a_table_has_measured_and_predicted_and_the_error() -> None:
    heading, row = compare_published(_RUNS[:1])
    shown = dict(zip(heading, row, strict=False))
    assert shown["run"] == "Megatron 1.7B, H100 80GB HBM3"
    assert shown["tokens/s a GPU"] == "36,259"
    assert row[heading.index("MFU")] == "41.3%"  # 408.8 of 989 TFLOP/s, by the table
    assert shown["error"].startswith("+")


def test_measured_mfu_is_that_of_the_sources() -> None:
    """By this project's count of operations, which is theirs to within a point."""
    for number, mfu in ((0, 0.41), (1, 0.47), (2, 0.49), (3, 0.46)):
        run = _RUNS[number]
        config = run.config()
        flops = measure_model(config).flops_per_token
        assert run.measured * flops / 989e12 == pytest.approx(mfu, abs=0.01)
