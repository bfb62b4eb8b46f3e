"""The learning rate of each schedule, step by step."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megaegpt.config import OptimizerConfig
from megaegpt.training.engine.schedule import learning_rate

_CONFIG = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)


def _rates(total: int, **changes: object) -> list[float]:
    config = dataclasses.replace(_CONFIG, **changes)  # type: ignore[arg-type]
    return [learning_rate(step, config, total) for step in range(total + 5)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_linearly_from_above_zero_to_the_peak(schedule: str) -> None:
    assert _rates(100, schedule=schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_halfway_in_the_middle_and_stays_at_its_end() -> None:
    rates = _rates(104, schedule="cosine")
    assert rates[54] == pytest.approx(0.55)
    assert rates[104:] == pytest.approx([0.1] * 5)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_linear_reaches_its_end_at_decay_steps() -> None:
    rates = _rates(100, schedule="linear", decay_steps=14)
    assert rates[9] == pytest.approx(0.55)
    assert rates[14:] == pytest.approx([0.1] * (len(rates) - 14))


def test_constant_stays_at_the_peak() -> None:
    assert _rates(50, schedule="constant")[4:] == [1.0] * 51


def test_wsd_is_stable_until_its_last_fifth() -> None:
    rates = _rates(100, schedule="wsd")
    assert rates[4:81] == [1.0] * 77
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert _rates(100, schedule="wsd", decay_steps=10)[90] == 1.0


def test_a_run_shorter_than_its_warm_up_has_a_rate_everywhere() -> None:
    rates = _rates(2, schedule="cosine")
    assert all(0 < rate <= 1 for rate in rates)
