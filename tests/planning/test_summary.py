"""What is said before step 0."""

from __future__ import annotations

import pytest

from megaegpt.config import ParallelConfig
from megaegpt.config.run import RunConfig
from megaegpt.planning.summary import ModelSize, describe_run
from megaegpt.precision import Precision


@pytest.mark.parametrize(
    ("stage", "precision", "runs"), [(0, "fp32", 0), (0, "bf16", 1), (0, "fp16", 1), (2, "bf16", 2)]
)
def test_the_zero_stage_is_the_one_that_runs(stage: int, precision: Precision, runs: int) -> None:
    """Half precision needs fp32 master weights, so stage 0 becomes 1 there."""
    config = RunConfig(parallel=ParallelConfig(zero_stage=stage))  # type: ignore[arg-type]
    lines = describe_run(config, ModelSize(1, 1), 1, precision, "cpu")
    assert any(f"ZeRO stage {runs}, {precision} on cpu" in line for line in lines)
