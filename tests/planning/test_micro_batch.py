"""The number that training.micro_batch_size=auto stands for follows from the memory there is."""

from __future__ import annotations

from typing import Any

import pytest

from megaegpt.config import BatchRampConfig, ModelConfig, ParallelConfig, TrainingConfig
from megaegpt.config.run import RunConfig
from megaegpt.planning import micro_batch
from megaegpt.planning.memory import MemoryEstimate, estimate_memory
from megaegpt.planning.micro_batch import (
    CPU_TOKENS,
    MemoryLimit,
    largest_that_fits,
    possible_sizes,
    with_micro_batch,
)


def _run(**training: Any) -> RunConfig:
    sizes = {"vocab_size": 500, "max_seq_len": 64, "hidden_size": 32, "num_layers": 2}
    return RunConfig(
        model=ModelConfig(**sizes, num_heads=4),  # type: ignore[arg-type]
        parallel=ParallelConfig(zero_stage=1),
        training=TrainingConfig(
            **{"global_batch_size": 48, "micro_batch_size": "auto", **training}
        ),
    )


@pytest.fixture
def simple_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 bytes, and one a sample."""

    def estimate(config: RunConfig, *_: object) -> MemoryEstimate:
        return MemoryEstimate(10, activations=config.training.chosen_micro_batch_size)

    monkeypatch.setattr(micro_batch, "estimate_memory", estimate)


def test_every_possible_number_gives_whole_micro_steps() -> None:
    assert possible_sizes(_run(), 2) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert possible_sizes(_run(), 48) == [1]
    ramp = BatchRampConfig(start=16, increment=8)
    assert possible_sizes(_run(batch_ramp=ramp), 2) == [1, 2, 4]


@pytest.mark.usefixtures("simple_plan")
@pytest.mark.parametrize("memory", range(11, 40))
def test_it_is_the_largest_that_the_memory_holds(memory: int) -> None:
    config = _run()
    choice = largest_that_fits(config, 2, "fp32", MemoryLimit(memory, "of a fake device"))
    fitting = [n for n in possible_sizes(config, 2) if 10 + n <= memory]
    assert (choice.size, choice.predicted) == (fitting[-1], 10 + fitting[-1])
    assert "of a fake device" in str(choice)
    assert "\n" not in str(choice)


def test_what_is_compared_is_the_plan_of_a_rank() -> None:
    config = _run(global_batch_size=4)
    takes = estimate_memory(with_micro_batch(config, 2), 2, "fp32", device_type="cpu").total
    for memory, size in ((takes, 2), (takes - 1, 1)):
        choice = largest_that_fits(config, 2, "fp32", MemoryLimit(memory, ""), device_type="cpu")
        assert choice.size == size
    assert f"2 would take {takes / 2**30:.2f} GiB" in str(choice)


@pytest.mark.usefixtures("simple_plan")
def test_a_single_sample_is_tried_even_where_the_plan_has_no_room_for_it() -> None:
    choice = largest_that_fits(_run(), 2, "fp32", MemoryLimit(1, "nothing"), device_type="cpu")
    assert choice.size == 1
    assert "does not fit" in str(choice)


@pytest.mark.usefixtures("simple_plan")
def test_a_cpu_gets_no_more_tokens_than_make_it_faster() -> None:
    config = _run(global_batch_size=2 * CPU_TOKENS)
    limit = MemoryLimit(2**50, "plenty", CPU_TOKENS)
    choice = largest_that_fits(config, 1, "fp32", limit, device_type="cpu")
    assert choice.size == CPU_TOKENS // config.model.max_seq_len
    assert "no faster" in str(choice)
    whole = largest_that_fits(config, 1, "fp32", limit, device_type="cpu", sample_tokens=1)
    assert whole.size == CPU_TOKENS


@pytest.mark.usefixtures("simple_plan")
def test_all_of_a_ranks_samples_are_the_most() -> None:
    choice = largest_that_fits(_run(), 2, "fp32", MemoryLimit(2**50, "plenty"), device_type="cpu")
    assert choice.size == 24
    assert "no more samples" in str(choice)
