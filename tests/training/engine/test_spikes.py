"""Which gradient norms stand out from those of the steps before."""

from __future__ import annotations

import math

import pytest

from megaegpt.config import TrainingConfig
from megaegpt.config.loading import config_from_values
from megaegpt.config.training import SpikeGuardConfig
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.training.engine.spikes import SpikeGuard

CONFIG = SpikeGuardConfig(factor=3.0, window=4)


def _spikes(guard: SpikeGuard, norms: list[float]) -> list[float]:
    return [norm for norm in norms if guard.is_spike(norm)]


def test_a_norm_stands_out_from_the_median_of_a_whole_window() -> None:
    guard = SpikeGuard(CONFIG)
    assert math.isnan(guard.median)
    assert _spikes(guard, [9.0, 1.0, 90.0, 2.0]) == []
    assert guard.median == 5.5
    assert _spikes(guard, [16.0, 27.0, 64.6]) == [64.6]  # medians 5.5, 9 and 21.5


def test_a_level_that_stays_becomes_the_usual_one() -> None:
    guard = SpikeGuard(CONFIG)
    assert _spikes(guard, [1.0] * 4 + [10.0] * 6) == [10.0] * 2


def test_a_norm_that_is_not_finite_is_no_spike_and_does_not_count() -> None:
    guard = SpikeGuard(CONFIG)
    assert _spikes(guard, [1.0, 1.0, 1.0, math.inf, math.nan]) == []
    assert math.isnan(guard.median)


def test_it_is_off_without_a_factor() -> None:
    assert not SpikeGuard(TrainingConfig().spike_guard).is_on
    assert SpikeGuard(CONFIG).is_on
    with pytest.raises(ConfigError, match=r"spike_guard has no effect without training\.spike_"):
        config_from_values({"training": {"spike_guard": {"window": 7}}})
    with pytest.raises(ConfigError, match=r"training\.spike_guard\.factor=0\.5 must be at least 1"):
        config_from_values({"training": {"spike_guard": {"factor": 0.5}}})


def test_a_restored_one_goes_on_as_if_undisturbed() -> None:
    norms = [1.0, 3.0, 0.1 + 0.2, 7.0, 1.5, 40.0, 2.0]
    straight, first = SpikeGuard(CONFIG), SpikeGuard(CONFIG)
    _spikes(first, norms[:5])
    resumed = SpikeGuard(CONFIG)
    resumed.restore(first.state())
    assert _spikes(resumed, norms[5:]) == _spikes(straight, norms) == [40.0]
    assert resumed.state() == straight.state()
    shorter = SpikeGuard(SpikeGuardConfig(factor=3.0, window=2))
    shorter.restore(straight.state())
    assert shorter.state() == [40.0, 2.0]
    with pytest.raises(CheckpointError, match="gradient norms is damaged"):
        resumed.restore(["1.0"])
