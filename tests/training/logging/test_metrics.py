"""Speed, utilisation and the log line."""

from __future__ import annotations

import resource
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from megaegpt.config import BatchRampConfig, BatchSchedule
from megaegpt.training.logging.metrics import (
    Speed,
    SpeedMeter,
    Stopwatch,
    log_line,
    peak_memory,
    short_count,
    short_time,
)

CPU = torch.device("cpu")


def _meter(ramp: BatchRampConfig, peak: float | None) -> SpeedMeter:
    """Of 100 steps of 10 samples of 100 tokens."""
    return SpeedMeter(BatchSchedule(10, ramp), 100.0, 100, 50, peak, CPU)


def test_speed_is_of_the_steps_measured_and_mfu_against_all_devices() -> None:
    speed = _meter(BatchRampConfig(), 1e6).measure(steps=10, seconds=2.0, done=40)
    assert speed.tokens_per_second == 5000
    assert speed.mfu == 0.25
    assert speed.seconds_left == 12.0
    unknown = _meter(BatchRampConfig(), None).measure(10, 2.0, 40)
    assert unknown.mfu is None


def test_while_the_batch_grows_speed_counts_the_tokens_there_were() -> None:
    meter = _meter(BatchRampConfig(start=2, increment=2, steps=10), None)
    early = meter.measure(steps=10, seconds=2.0, done=20)
    assert early.tokens_per_second == 10 * 4 * 100 / 2
    left = (6 + 8) * 10 + 60 * 10
    assert early.seconds_left == pytest.approx(left * 100 / early.tokens_per_second)


def test_the_stopwatch_stands_still_while_paused() -> None:
    watch = Stopwatch()
    watch.start()
    time.sleep(0.02)
    watch.pause()
    time.sleep(0.1)
    watch.start()
    assert 0.02 <= watch.restart() < 0.1
    time.sleep(0.02)
    assert 0.02 <= watch.restart() < 0.1


def test_the_log_line() -> None:
    speed = Speed(2_900_000.0, 0.461, 3480.0, 858_993_459)
    assert log_line(12, 2000, 4.81, 1.02, 6e-4, speed) == (
        "step 00012/02000 (0.60%) | loss 4.8100 | norm 1.02 | lr 6.0e-04 | tok/s 2.9M | "
        "mfu 46.1% | mem 0.8G | eta 58m00s"
    )
    line = log_line(12, 2000, 4.81, 1.02, 6e-4, Speed(950.0, None, 5.0, 0), {"skipped": 3})
    assert "tok/s 950 | mfu n/a" in line
    assert line.endswith("eta 5s | skipped 3")


def test_short_forms() -> None:
    assert [short_count(n) for n in (7, 1234, 2.5e6, 1.2e9)] == ["7", "1.2k", "2.5M", "1.2B"]
    assert [short_time(s) for s in (9, 95, 3700, 90000)] == ["9s", "1m35s", "1h01m", "1d01h"]


def test_memory_on_a_cpu_is_the_process_s() -> None:
    assert 50e6 < peak_memory(CPU) < 100e9


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_systems_unit_of_memory_is_known(
    monkeypatch: pytest.MonkeyPatch, platform: str, unit: int
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert peak_memory(CPU) == 7 * unit
