"""What plans assume of machines. Speeds are peaks of data sheets, per GPU and direction.

NVLink is counted there in both directions together, so half of it is taken; a DGX's network is
divided by its GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

from megaegpt.errors import ConfigError
from megaegpt.precision import Precision, default_precision
from megaegpt.training.logging.metrics import peak_flops


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or one process's share of a CPU, and its connections."""

    name: str
    """As the driver gives it; the key to its peak FLOP/s in :func:`peak_flops`."""
    memory: int
    """Bytes."""
    node_bandwidth: float
    """Bytes per second to others in the machine."""
    network_bandwidth: float
    """Bytes per second to other machines."""
    device_type: str = "cuda"

    def peak_flops(self, precision: Precision) -> float | None:
        """Dense matrix FLOP/s; None where it is not known."""
        return peak_flops(self.name, precision)

    def precision(self, wanted: str) -> Precision:
        """What ``auto`` becomes there; the rest is taken as it is."""
        return default_precision(self.device_type) if wanted == "auto" else cast(Precision, wanted)


_GIB, _GB = 2**30, 1e9
_PCIE_4 = 31.5 * _GB  # 16 lanes of 16 GT/s, 128b/130b
_TEN_GIGABIT, _HUNDRED_GIGABIT = 1.25 * _GB, 12.5 * _GB  # an assumption: no vendor's system

_ACCELERATORS = {
    # NVIDIA DGX B200 data sheet: 1,440 GB over 8 GPUs, NVLink 14.4 TB/s in all, 8 x 400 Gb/s
    "b200": Accelerator("NVIDIA B200", int(180 * _GB), 900 * _GB, 50 * _GB),
    # NVIDIA H200 data sheet: 141 GB, NVLink 900 GB/s; DGX H200: 8 x 400 Gb/s
    "h200": Accelerator("NVIDIA H200", int(141 * _GB), 450 * _GB, 50 * _GB),
    # NVIDIA H100 data sheet (SXM): 80 GB, NVLink 900 GB/s; DGX H100: 8 x 400 Gb/s
    "h100": Accelerator("NVIDIA H100 80GB HBM3", 80 * _GIB, 450 * _GB, 50 * _GB),
    # NVIDIA A100 data sheet (SXM): 80 or 40 GB, NVLink 600 GB/s; DGX A100: 8 x 200 Gb/s
    "a100": Accelerator("NVIDIA A100-SXM4-80GB", 80 * _GIB, 300 * _GB, 25 * _GB),
    "a100-40gb": Accelerator("NVIDIA A100-SXM4-40GB", 40 * _GIB, 300 * _GB, 25 * _GB),
    # NVIDIA V100 data sheet (SXM2): 32 GB, NVLink 300 GB/s; DGX-1: 4 x 100 Gb/s for 8 GPUs
    "v100": Accelerator("Tesla V100-SXM2-32GB", 32 * _GIB, 150 * _GB, 6.25 * _GB),
    # NVIDIA L40S data sheet: 48 GB, PCIe 4.0 x16
    "l40s": Accelerator("NVIDIA L40S", 48 * _GIB, _PCIE_4, _HUNDRED_GIGABIT),
    # NVIDIA A10 data sheet: 24 GB, PCIe 4.0 x16
    "a10": Accelerator("NVIDIA A10", 24 * _GIB, _PCIE_4, _HUNDRED_GIGABIT),
    # NVIDIA Ada and Ampere architecture papers: 24 GB, PCIe 4.0 x16
    "rtx4090": Accelerator("NVIDIA GeForce RTX 4090", 24 * _GIB, _PCIE_4, _TEN_GIGABIT),
    "rtx3090": Accelerator("NVIDIA GeForce RTX 3090", 24 * _GIB, _PCIE_4, _TEN_GIGABIT),
}


def accelerator_names() -> list[str]:
    """What :func:`find_accelerator` knows."""
    return [*_ACCELERATORS, "cpu"]


def find_accelerator(name: str, per_node: int) -> Accelerator:
    """The entry ``name``; ``cpu`` is this machine, its memory shared by ``per_node`` processes.

    Raises:
        ConfigError: no such entry.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Accelerator("cpu", memory // per_node, 10 * _GB, _TEN_GIGABIT, "cpu")
    if name.lower() not in _ACCELERATORS:
        known = ", ".join(accelerator_names())
        raise ConfigError(f"--gpu {name} is not in the table: choose one of {known}")
    return _ACCELERATORS[name.lower()]
