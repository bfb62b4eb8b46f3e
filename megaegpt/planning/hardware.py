"""Data sheets of GPUs: their peak operations, and the machines that plans assume around them.

Speeds are peaks of data sheets, per GPU and direction; the memory's is of reads and writes
together. NVLink is counted there in both directions together, so half of it is taken; a DGX's
network is divided by its GPUs.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megaegpt.errors import ConfigError

if TYPE_CHECKING:
    from megaegpt.precision import Precision

USABLE_MEMORY = 0.9
"""Share of a GPU's memory that a plan may fill; the rest is left to its context, libraries'
workspaces and fragmentation."""


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or one process's share of a CPU, and its connections."""

    name: str
    """As the driver gives it."""
    memory: int
    """Bytes."""
    node_bandwidth: float
    """Bytes per second to others in the machine."""
    network_bandwidth: float
    """Bytes per second to other machines."""
    device_type: str = "cuda"
    memory_bandwidth: float | None = None
    """Bytes per second between the GPU and its own memory; None where it is not known."""
    reached_products: float = 0.6
    """Share of the peak that matrix products with long sums reach, in training."""
    products_from: str = "assumption: as an H100's"
    """Where that is from."""
    reached_attention: float = 0.35
    """Share of the peak that fused attention reaches at 128 columns a head, forward and backward,
    where the half that causality hides is not counted."""

    def peak_flops(self, precision: Precision) -> float | None:
        """Dense matrix FLOP/s; None where it is not known."""
        return peak_flops(self.name, precision)

    def precision(self, wanted: str) -> Precision:
        """Resolve ``auto`` for this device; any other precision is returned unchanged."""
        from megaegpt.precision import default_precision  # imports torch, which --help need not

        if wanted != "auto":
            return cast("Precision", wanted)
        if self.peak_flops("bf16") is None and self.peak_flops("fp16") is not None:
            return "fp16"  # a GPU before Ampere
        return default_precision(self.device_type)


@dataclass(frozen=True)
class _Device:
    """The data sheet of a GPU."""

    words: str
    """All of them occur in the name that the driver gives, beside words that name no other device
    (:data:`_SAYS_NOTHING`)."""
    tflops: float
    """Dense matrix operations in bf16 and fp16."""
    option: str | None = None
    """Its name on the command line, where plans can be made for it."""
    accelerator: Accelerator | None = None


_GIB, _GB = 2**30, 1e9
_PCIE_4 = 31.5 * _GB  # 16 lanes of 16 GT/s, 128b/130b
_TEN_GIGABIT, _HUNDRED_GIGABIT = 1.25 * _GB, 12.5 * _GB  # an assumption: no vendor's system


def _planned(
    words: str,
    tflops: float,
    option: str,
    name: str,
    memory: float,
    speed: float,
    node: float,
    network: float,
    **reached: Any,
) -> _Device:
    accelerator = Accelerator(name, int(memory), node, network, memory_bandwidth=speed, **reached)
    return _Device(words, tflops, option, accelerator)


# Of products: each chosen by a published run (planning/published.py). Of attention: what
# FlashAttention-2 reaches, 35% on an H100 (arXiv 2407.08608) and 50 to 73% on an A100 (arXiv
# 2307.08691).
_OF_H100 = {"reached_products": 0.6, "products_from": "Megatron's 7.1B on 96 H100s"}
_OF_A100 = {
    "reached_products": 0.74,
    "products_from": "torchtitan's Llama 2 13B on 64 A100s",
    "reached_attention": 0.6,
}

_SAYS_NOTHING = re.compile(
    r"NVIDIA|AMD|Tesla|GeForce|Instinct|PCIE|PCIe|SXM[2-5]|HBM[23]e?|\d+GB?", re.ASCII
)
"""A word in a device's name that stands for no other peak: of a maker, a form or a memory. Others
do, such as Laptop, Ti, D, MIG and NVL."""

_DEVICES = (  # the first that a device's name is of counts
    # NVIDIA DGX B200 data sheet: 1,440 GB over 8 GPUs, NVLink 14.4 TB/s in all, 8 x 400 Gb/s
    _planned("B200", 2250.0, "b200", "NVIDIA B200", 180 * _GB, 8000 * _GB, 900 * _GB, 50 * _GB),
    _Device("GH200", 989.0),
    # NVIDIA H200 data sheet: 141 GB, NVLink 900 GB/s; DGX H200: 8 x 400 Gb/s
    _planned(
        "H200",
        989.0,
        "h200",
        "NVIDIA H200",
        141 * _GB,
        4800 * _GB,
        450 * _GB,
        50 * _GB,
        **_OF_H100,
    ),
    _Device("H100 PCIe", 756.0),
    _Device("H100 NVL", 835.0),
    # NVIDIA H100 data sheet (SXM): 80 GB, NVLink 900 GB/s; DGX H100: 8 x 400 Gb/s
    _planned(
        "H100",
        989.0,
        "h100",
        "NVIDIA H100 80GB HBM3",
        80 * _GIB,
        3350 * _GB,
        450 * _GB,
        50 * _GB,
        **_OF_H100,
    ),
    # NVIDIA A100 data sheet (SXM): 80 or 40 GB, NVLink 600 GB/s; DGX A100: 8 x 200 Gb/s
    _planned(
        "A100 40GB",
        312.0,
        "a100-40gb",
        "NVIDIA A100-SXM4-40GB",
        40 * _GIB,
        1555 * _GB,
        300 * _GB,
        25 * _GB,
        **_OF_A100,
    ),
    _planned(
        "A100",
        312.0,
        "a100",
        "NVIDIA A100-SXM4-80GB",
        80 * _GIB,
        2039 * _GB,
        300 * _GB,
        25 * _GB,
        **_OF_A100,
    ),
    # NVIDIA L40S data sheet: 48 GB, PCIe 4.0 x16
    _planned("L40S", 362.0, "l40s", "NVIDIA L40S", 48 * _GIB, 864 * _GB, _PCIE_4, _HUNDRED_GIGABIT),
    _Device("L4", 121.0),
    _Device("A10G", 70.0),
    # NVIDIA A10 data sheet: 24 GB, PCIe 4.0 x16
    _planned("A10", 125.0, "a10", "NVIDIA A10", 24 * _GIB, 600 * _GB, _PCIE_4, _HUNDRED_GIGABIT),
    _Device("V100 PCIE", 112.0),
    # NVIDIA V100 data sheet (SXM2): 32 GB, NVLink 300 GB/s; DGX-1: 4 x 100 Gb/s for 8 GPUs
    _planned(
        "V100", 125.0, "v100", "Tesla V100-SXM2-32GB", 32 * _GIB, 900 * _GB, 150 * _GB, 6.25 * _GB
    ),
    # NVIDIA Ada and Ampere architecture papers: 24 GB, PCIe 4.0 x16
    _planned(
        "RTX 4090",
        165.2,
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        24 * _GIB,
        1008 * _GB,
        _PCIE_4,
        _TEN_GIGABIT,
    ),
    _planned(
        "RTX 3090",
        71.0,
        "rtx3090",
        "NVIDIA GeForce RTX 3090",
        24 * _GIB,
        936 * _GB,
        _PCIE_4,
        _TEN_GIGABIT,
    ),
    _Device("MI300X", 1307.4),
    _Device("MI250X", 191.5),  # one of the package's two dies, each a device of torch's
)
_ACCELERATORS = {d.option: d.accelerator for d in _DEVICES if d.option and d.accelerator}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense matrix FLOP/s of one device, or None where it is not known (fp32, CPUs, new devices,
    and parts and variants of known ones).

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: ``bf16``, ``fp16`` or ``fp32``.
    """
    if precision not in ("bf16", "fp16"):
        return None
    if precision == "bf16" and "V100" in _words(device_name):
        return None
    device = _find(device_name)
    return None if device is None else device.tflops * 1e12


def accelerator_of(device_name: str) -> Accelerator | None:
    """The entry of a GPU by the name that its driver gives; None where the table has none."""
    device = _find(device_name)
    return None if device is None else device.accelerator


def _words(device_name: str) -> list[str]:
    return device_name.replace("-", " ").split()


def _find(device_name: str) -> _Device | None:
    words = _words(device_name)
    return next((d for d in _DEVICES if _is_named(d, words)), None)


def _is_named(device: _Device, words: list[str]) -> bool:
    own = device.words.split()
    others = [word for word in words if word not in own]
    return set(own) <= set(words) and all(map(_SAYS_NOTHING.fullmatch, others))


def accelerator_names() -> list[str]:
    """List the names that :func:`find_accelerator` takes."""
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


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes of this machine's memory that programs can still have, within the limit of the
    container (cgroup v2) that this one runs in.

    Source: proc_meminfo(5); Documentation/admin-guide/cgroup-v2.rst of Linux.
    """
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        found = min(found, max(0, limit - used + _file_cache(group)))
    return found


def _file_cache(group: Path) -> int:
    """Bytes of a container's memory that are given back when they are wanted."""
    for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
