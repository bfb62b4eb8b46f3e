"""The global batch of each step, and which samples come before it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaegpt.config import BatchRampConfig, BatchSchedule


def test_the_batch_grows_by_steps_and_stays_at_its_final_size() -> None:
    schedule = BatchSchedule(10, BatchRampConfig(start=4, increment=4, steps=3))
    assert [schedule.size(step) for step in range(9)] == [4, 4, 4, 8, 8, 8, 10, 10, 10]
    assert schedule.sizes() == [4, 8, 10]
    assert schedule.ramp_steps == 6


def test_without_a_start_every_step_is_the_same() -> None:
    schedule = BatchSchedule(6)
    assert {schedule.size(step) for step in (0, 1, 99)} == {6}
    assert [schedule.samples_before(step) for step in range(3)] == [0, 6, 12]
    assert (schedule.sizes(), schedule.ramp_steps) == ([6], 0)


@given(
    final=st.integers(2, 60),
    start=st.integers(1, 60),
    increment=st.integers(1, 70),
    steps=st.integers(1, 7),
)
def test_samples_before_a_step_are_the_sum_of_the_steps_before(
    final: int, start: int, increment: int, steps: int
) -> None:
    schedule = BatchSchedule(final, BatchRampConfig(min(start, final - 1), increment, steps))
    seen = 0
    for step in range(schedule.ramp_steps + 5):
        assert schedule.samples_before(step) == seen
        assert (schedule.size(step) == final) == (step >= schedule.ramp_steps)
        assert schedule.size(step) in schedule.sizes()
        seen += schedule.size(step)


@pytest.mark.parametrize("ramp", [BatchRampConfig(), BatchRampConfig(2, 2, 3)])
def test_a_schedule_that_goes_on_has_its_sizes_from_the_sample_on_that_it_is_given(
    ramp: BatchRampConfig,
) -> None:
    schedule = BatchSchedule(8, ramp)
    moved = schedule.going_on(5, 100)
    assert moved.samples_before(5) == 100
    assert [moved.size(step) for step in range(20)] == [schedule.size(step) for step in range(20)]
    assert moved.samples_before(9) - 100 == schedule.samples_before(9) - schedule.samples_before(5)
    assert moved.going_on(9, schedule.samples_before(9)) == schedule


@pytest.mark.parametrize("step", [0, 10**9])
def test_a_far_step_costs_nothing(step: int) -> None:
    schedule = BatchSchedule(1 << 20, BatchRampConfig(start=1, increment=1, steps=1))
    assert schedule.size(step) == min(step + 1, 1 << 20)
    assert schedule.samples_before(step) >= step
