"""A run on more and more GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from megaegpt.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megaegpt.config.training import BatchRampConfig
from megaegpt.errors import ConfigError
from megaegpt.planning.hardware import find_accelerator
from megaegpt.planning.plan import Machines, make_plan
from megaegpt.planning.scaling import describe_scaling, plot_scaling, weak_scaling


def test_it_begins_with_whole_samples_and_without_a_ramp() -> None:
    config = RunConfig(
        model=ModelConfig(
            vocab_size=600, max_seq_len=36, hidden_size=64, num_layers=1, num_heads=4
        ),
        parallel=ParallelConfig(tensor_parallel_size=2, context_parallel_size=3),
        training=TrainingConfig(
            precision="bf16",
            global_batch_size=32,
            micro_batch_size=1,
            batch_ramp=BatchRampConfig(start=8, increment=8),
        ),
    )
    plan = make_plan(config, Machines(find_accelerator("h100", 8), 24, 8))
    steps = weak_scaling(plan)
    assert [step.plan.machines.gpus for step in steps] == [12, 24]
    assert [step.plan.config.training.global_batch_size for step in steps] == [16, 32]


def _small(offload: Literal["none", "optimizer"] = "none", stage: int = 2) -> RunConfig:
    """Of 96 samples a step."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=500, max_seq_len=16, hidden_size=32, num_layers=1, num_heads=2
        ),
        parallel=ParallelConfig(zero_stage=stage, offload=offload),
        training=TrainingConfig(precision="bf16", global_batch_size=96, micro_batch_size=1),
    )


@pytest.mark.parametrize(("gpus", "counts"), [(4, [4]), (12, [8, 12])])
def test_it_ends_with_the_gpus_of_the_plan(gpus: int, counts: list[int]) -> None:
    plan = make_plan(_small(), Machines(find_accelerator("h100", 8), gpus, 8))
    steps = weak_scaling(plan)
    assert [step.plan.machines.gpus for step in steps] == counts
    assert steps[-1].plan.config.training.global_batch_size == 96


def test_what_cpus_update_is_not_simulated() -> None:
    plan = make_plan(_small("optimizer", 3), Machines(find_accelerator("h100", 8), 8, 8))
    with pytest.raises(ConfigError, match=r"^a step with parallel.offload=optimizer cannot be"):
        weak_scaling(plan)


@pytest.mark.long
def test_each_rank_does_the_same_on_any_number_of_gpus_and_waits_longer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = RunConfig(
        model=ModelConfig(
            vocab_size=500, max_seq_len=32, hidden_size=64, num_layers=1, num_heads=2
        ),
        parallel=ParallelConfig(tensor_parallel_size=2),
        training=TrainingConfig(precision="bf16", global_batch_size=32, micro_batch_size=1),
    )
    plan = make_plan(config, Machines(find_accelerator("h100", 8), 16, 8))
    steps = weak_scaling(plan)
    assert [step.plan.machines.gpus for step in steps] == [8, 16]
    assert [step.plan.config.training.global_batch_size for step in steps] == [16, 32]
    assert {step.compute for step in steps} == {steps[0].compute}
    assert {step.micro_steps for step in steps} == {4}
    exposed = [step.exposed for step in steps]
    assert exposed[1] > exposed[0]
    assert len(describe_scaling(steps)) == 3
    plot_scaling(steps, tmp_path / "scaling.png", "a model")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
