"""Speed, model FLOPs utilisation, memory, and the line that reports them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megaegpt.config import BatchSchedule
from megaegpt.text_tables import short_count, short_time


def device_name(device: torch.device) -> str:
    """Name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stopwatch:
    """Seconds spent in training steps: it does not run during evaluations and checkpoints."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        """Run (again)."""
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self) -> None:
        """Stand still until ``start``."""
        self._seconds, self._started = self._now(), None

    def restart(self) -> float:
        """Seconds since the last call; counts from 0 again."""
        seconds, self._seconds = self._now(), 0.0
        if self._started is not None:
            self._started = time.perf_counter()
        return seconds

    def _now(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running


@dataclass(frozen=True)
class Speed:
    """How fast the steps since the last report were."""

    tokens_per_second: float
    """Predicted tokens of all ranks."""
    mfu: float | None
    """Model FLOP/s over the devices' peak, 0..1; None where the peak is not known."""
    seconds_left: float
    """To the run's last step, evaluations and checkpoints not counted."""
    memory: int
    """Peak bytes, of this rank or of the rank that has most."""

    def as_dict(self) -> dict[str, float | None]:
        """Names and values to record."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "memory_gib": self.memory / 2**30,
        }


@dataclass(frozen=True)
class SpeedMeter:
    """Turns elapsed seconds into a :class:`Speed`."""

    batches: BatchSchedule
    tokens_per_sample: float
    """Predicted ones; their mean, where samples differ."""
    total_steps: int
    flops_per_token: int
    peak_flops: float | None
    """Peak FLOP/s of all ranks' devices together; None where it is not known."""
    device: torch.device

    def measure(self, steps: int, seconds: float, done: int) -> Speed:
        """Speed of ``steps`` steps that took ``seconds``, the last being number ``done``."""
        first, next_, end = map(self.batches.samples_before, (done - steps, done, self.total_steps))
        samples_per_second = (next_ - first) / seconds
        tokens_per_second = samples_per_second * self.tokens_per_sample
        achieved = tokens_per_second * self.flops_per_token
        return Speed(
            tokens_per_second=tokens_per_second,
            mfu=None if self.peak_flops is None else achieved / self.peak_flops,
            seconds_left=(end - next_) / samples_per_second,
            memory=peak_memory(self.device),
        )


def log_line(
    done: int,
    total: int,
    loss: float,
    grad_norm: float,
    lr: float,
    speed: Speed,
    left_out: Mapping[str, int] | None = None,
) -> str:
    """``step 00012/02000 (0.60%) | loss 4.8100 | norm 1.02 | lr 6.0e-04 | tok/s 2.9M | ...``

    Args:
        left_out: how many steps were, by the reason; shown where there are any.
    """
    width = max(5, len(str(total)))
    mfu = "n/a" if speed.mfu is None else f"{100 * speed.mfu:.1f}%"
    fields = [
        f"step {done:0{width}d}/{total:0{width}d} ({100 * done / total:.2f}%)",
        f"loss {loss:.4f}",
        f"norm {grad_norm:.2f}",
        f"lr {lr:.1e}",
        f"tok/s {short_count(speed.tokens_per_second)}",
        f"mfu {mfu}",
        f"mem {speed.memory / 2**30:.1f}G",
        f"eta {short_time(speed.seconds_left)}",
    ]
    fields += [f"{reason} {count}" for reason, count in (left_out or {}).items() if count]
    return " | ".join(fields)
