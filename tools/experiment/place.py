"""Where a run was, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from megaegpt.training.logging.metrics import device_name


def describe_machine(device: torch.device) -> str:
    """The device, and what may be used of it."""
    if device.type == "cuda":
        return f"{device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    used = f"{threads} thread{'s' if threads > 1 else ''} on {os.cpu_count()} cores"
    return f"{_cpu_model()} ({used}), torch {torch.__version__}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"
