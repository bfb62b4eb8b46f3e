"""Where a run was, in words."""

from __future__ import annotations

import os

import torch

from megaegpt.parallel.devices import processor_details
from megaegpt.training.logging.metrics import device_name


def describe_machine(device: torch.device) -> str:
    """The device, and what may be used of it."""
    if device.type == "cuda":
        return f"{device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    used = f"{threads} thread{'s' if threads > 1 else ''} on {os.cpu_count()} cores"
    return f"{processor_details()} ({used}), torch {torch.__version__}"
