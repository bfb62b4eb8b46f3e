"""Speed, utilisation and the log line."""

from __future__ import annotations

import time

import pytest
import torch

from megaegpt.config import BatchRampConfig, BatchSchedule
from megaegpt.training.logging.metrics import (
    Speed,
    SpeedMeter,
    Stopwatch,
    log_line,
    peak_flops,
    peak_memory,
    short_count,
    short_time,
)

CPU = torch.device("cpu")


def _meter(ramp: BatchRampConfig, peak: float | None) -> SpeedMeter:
    """Of 100 steps of 10 samples of 100 tokens."""
    return SpeedMeter(BatchSchedule(10, ramp), 100.0, 100, 50, peak, CPU)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_the_peak_comes_from_the_device_s_name(name: str, tflops: float) -> None:
    assert peak_flops(name, "bf16") == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "fp32"),
        ("NVIDIA A100-SXM4-80GB", "fp32"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA X9000 of next year", "bf16"),
    ],
)
def test_an_unknown_peak_is_not_guessed(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


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
    line = log_line(12, 2000, 4.81, 1.02, 6e-4, Speed(950.0, None, 5.0, 0), skipped=3)
    assert "tok/s 950 | mfu n/a" in line
    assert line.endswith("eta 5s | skipped 3")


def test_short_forms() -> None:
    assert [short_count(n) for n in (7, 1234, 2.5e6, 1.2e9)] == ["7", "1.2k", "2.5M", "1.2B"]
    assert [short_time(s) for s in (9, 95, 3700, 90000)] == ["9s", "1m35s", "1h01m", "1d01h"]


def test_memory_on_a_cpu_is_the_process_s() -> None:
    assert 50e6 < peak_memory(CPU) < 100e9
