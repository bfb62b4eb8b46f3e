"""What is said before step 0."""

from __future__ import annotations

import pytest

from megaegpt.config import ModelConfig, OptimizerConfig, ParallelConfig
from megaegpt.config.parameter_groups import ParameterGroup
from megaegpt.config.run import RunConfig
from megaegpt.errors import ConfigError
from megaegpt.planning.summary import ModelSize, describe_run, measure_model
from megaegpt.precision import Precision


def test_attention_over_shorter_samples_is_fewer_operations() -> None:
    """As those of a model whose context is no longer than they are."""

    def flops(context: int, sample_tokens: float | None = None) -> int:
        config = RunConfig(model=ModelConfig(max_seq_len=context, positions="rotary"))
        return measure_model(config, sample_tokens=sample_tokens).flops_per_token

    assert flops(1024, 64.2) == flops(64) < flops(1024) == flops(1024, 1024.0)


def test_a_step_has_the_tokens_that_its_samples_have() -> None:
    config = RunConfig()
    step = describe_run(config, ModelSize(1, 1), 1, "fp32", "cpu")[2]
    assert "8,192 tokens = 8 samples of 1,024 = " in step
    mean = describe_run(config, ModelSize(1, 1), 1, "fp32", "cpu", sample_tokens=40.25)
    assert "322 tokens = 8 samples of 40 on average = " in mean[2]
    assert "1,000 steps, 322.0k tokens" in mean[3]


@pytest.mark.parametrize(
    ("stage", "precision", "runs"), [(0, "fp32", 0), (0, "bf16", 1), (0, "fp16", 1), (2, "bf16", 2)]
)
def test_the_zero_stage_is_the_one_that_runs(stage: int, precision: Precision, runs: int) -> None:
    """Half precision needs fp32 master weights, so stage 0 becomes 1 there."""
    config = RunConfig(parallel=ParallelConfig(zero_stage=stage))  # type: ignore[arg-type]
    lines = describe_run(config, ModelSize(1, 1), 1, precision, "cpu")
    assert any(f"ZeRO stage {runs}, {precision} on cpu" in line for line in lines)


def test_a_pattern_of_optimizer_groups_that_matches_nothing_is_told_before_a_run() -> None:
    groups = (ParameterGroup("*.bias"), ParameterGroup("lm_head.*"))
    config = RunConfig(optimizer=OptimizerConfig(groups=groups))
    with pytest.raises(ConfigError, match=r"groups\[1\]\.match: 'lm_head\.\*' matches no"):
        measure_model(config)
