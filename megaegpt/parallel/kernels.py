"""Which library's matrix product is the fastest with few rows, measured once on a machine.

With few rows, as in decoding, a product takes as long as reading its weight, and how near a library
comes to the memory's speed depends on the processor: of torch's own product (MKL in most builds)
and oneDNN's, the one is ahead on Intel's and the other on AMD's (docs/benchmarks.md). They agree to
rounding. Training is not concerned: with many rows the two are within a few hundredths of each
other on Intel's processors, oneDNN is ahead on AMD's, and a run gives the same bits wherever it is
resumed. Nor is generated code (``matmul.MOST_GENERATED_ROWS``): to compile it takes longer than to
measure all else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megaegpt.errors import ConfigError, DataError, FolderInUseError
from megaegpt.files import cache_folder, locked_folder, write_whole
from megaegpt.json_files import read_json
from megaegpt.parallel.devices import processor_details
from megaegpt.parallel.matmul import onednn_is_available, onednn_linear, packed_order

CHOICE = "MEGAEGPT_KERNELS"
"""Environment variable: ``onednn`` or ``blas`` measure nothing, ``measure`` measures anew. Where
results must agree to the bit it changes nothing."""

ROWS = (1, 4, 8, 32)
"""Numbers of rows that are measured, each for those above the one before; more are oneDNN's."""

Dtype = Literal["fp32", "bf16"]
Size = Literal["block", "head"]

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHAPES: dict[Size, tuple[int, int]] = {"block": (768, 768), "head": (16384, 1024)}
_LARGE = 1 << 23
"""Numbers of a weight from which on it is like a head's and not like one of a block's."""
_COLD_BYTES = 64 << 20
"""Weights that are read in turn: more than caches hold, as those of a whole model are."""
_ROUNDS = 3
_LONGEST_S = 1.5
"""What is not measured by then is left as it would be without measuring."""
_POLL_S = 0.05
_POLLS = 40
"""So often a table is looked for that another process is measuring."""
_UNDISTURBED = 0.9
"""Share of its threads' time from which on measuring had the processor to itself (0.97 is usual):
beside other work the threads wait for each other, and MKL's products look faster than oneDNN's."""
_GAIN = 1.05
"""A product has to be so much faster than oneDNN's in every round: less may be chance."""


@dataclass(frozen=True)
class Machine:
    """What the speed of products depends on."""

    processor: str
    """With its numbers: in virtual machines several processors have one name."""
    instructions: str
    """The widest vectors that torch uses."""
    torch: str
    threads: int

    @staticmethod
    def here() -> Machine:
        """This machine, in this process."""
        return Machine(
            processor_details(),
            torch.backends.cpu.get_cpu_capability(),
            torch.__version__,
            torch.get_num_threads(),
        )


@dataclass(frozen=True)
class ProductSpeed:
    """How fast a product of some rows with one size of weights reads these, in GB/s."""

    dtype: Dtype
    size: Size
    rows: int
    onednn: float
    """In bf16 with weights in oneDNN's own order (``matmul.packed_order``)."""
    blas: float
    """Of ``torch.nn.functional.linear``."""
    blas_is_faster: bool
    """In every round, by more than chance."""


@dataclass(frozen=True)
class KernelTable:
    """What was measured; without products, oneDNN's are taken throughout."""

    machine: Machine | None = None
    products: tuple[ProductSpeed, ...] = ()

    def takes_blas(self, product: ProductSpeed) -> bool:
        """Whether torch's own product is taken: where it is the faster one, and in bf16 also where
        it is with one row of such a weight, for then no other is kept in oneDNN's order.
        """
        decisive = 1 if product.dtype == "bf16" else product.rows
        return product.blas_is_faster or any(
            other.blas_is_faster
            for other in self.products
            if (other.dtype, other.size, other.rows) == (product.dtype, product.size, decisive)
        )

    def blas_rows(self, weight: Tensor) -> frozenset[int]:
        """The numbers of rows with which torch's own product with ``weight`` is taken."""
        size = "head" if weight.numel() >= _LARGE else "block"
        return frozenset(
            rows
            for before, most in zip((0, *ROWS), ROWS, strict=False)
            for product in self.products
            if (product.size, product.rows) == (size, most) and self.takes_blas(product)
            if _DTYPES[product.dtype] == weight.dtype
            for rows in range(before + 1, most + 1)
        )


def kernel_choice() -> str:
    """What ``MEGAEGPT_KERNELS`` says; ``measured`` where it is unset.

    Raises:
        ConfigError: it is none of its values.
    """
    choice = os.environ.get(CHOICE) or "measured"
    if choice not in ("measured", "measure", "onednn", "blas"):
        raise ConfigError(
            f"{CHOICE}={choice} is not known: onednn and blas choose a library, measure measures "
            "anew, and unset this machine's table is used"
        )
    return choice


def choose_kernels(processes: int = 1) -> KernelTable:
    """The table of this machine, from the user's cache folder or measured now, in about a second.

    Several processes, whose results must agree to the bit wherever they are, and deterministic
    algorithms take oneDNN's products throughout, whatever the environment says, as does a machine
    without oneDNN what it has.

    Raises:
        ConfigError: ``MEGAEGPT_KERNELS`` is none of its values.
    """
    machine, choice = Machine.here(), kernel_choice()
    if processes > 1 or torch.are_deterministic_algorithms_enabled():
        return KernelTable(machine)
    if choice == "blas":
        return KernelTable(machine, _all_by_blas())
    if choice == "onednn" or not onednn_is_available():
        return KernelTable(machine)
    return stored_table(machine, measure, anew=choice == "measure")


def stored_table(
    machine: Machine,
    measured: Callable[[], tuple[ProductSpeed, ...]],
    *,
    anew: bool = False,
) -> KernelTable:
    """The table in the cache folder, or from ``measured`` where there is none that is whole and of
    this machine; where the folder cannot be written it is measured and not kept, as is what a busy
    machine had no time for, or measured beside other work. While another process measures, its
    table is waited for, for 2 s; then oneDNN's products are taken.
    """
    try:
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that is read-only
        return KernelTable(machine, measured())
    key = hashlib.sha256(json.dumps(asdict(machine)).encode()).hexdigest()[:16]
    path = folder / f"{key}.json"
    for _ in range(_POLLS):
        if not anew and (table := _read(path, machine)) is not None:
            return table
        try:
            with locked_folder(folder):
                return _read_or_measured(path, machine, measured, anew)
        except FolderInUseError:
            time.sleep(_POLL_S)
        except (OSError, DataError):
            return KernelTable(machine, measured())
    return KernelTable(machine)


def _read_or_measured(
    path: Path, machine: Machine, measured: Callable[[], tuple[ProductSpeed, ...]], anew: bool
) -> KernelTable:
    """With the folder locked: what the process has left that had locked it before, or a new one."""
    if not anew and (table := _read(path, machine)) is not None:
        return table
    products, share = with_share_of_processor(measured, machine.threads)
    table = KernelTable(machine, products)
    if _is_whole(table) and share >= _UNDISTURBED:
        with contextlib.suppress(OSError, DataError):
            write_whole(path, (json.dumps(asdict(table), indent=1) + "\n").encode())
    return table


def with_share_of_processor(
    measured: Callable[[], tuple[ProductSpeed, ...]], threads: int
) -> tuple[tuple[ProductSpeed, ...], float]:
    """What was measured, and how much of the time of ``threads`` threads this process had."""
    began, used = time.perf_counter(), time.process_time()
    products = measured()
    return products, (time.process_time() - used) / (time.perf_counter() - began) / threads


def _read(path: Path, machine: Machine) -> KernelTable | None:
    try:
        table = read_json(path, KernelTable)
    except DataError:
        return None
    return table if table.machine == machine and _is_whole(table) else None


def _is_whole(table: KernelTable) -> bool:
    """Whether it has what is measured here, once each."""
    found = [(product.dtype, product.size, product.rows) for product in table.products]
    wanted = [(d, s, rows) for d in _measured_dtypes() for s in _SHAPES for rows in ROWS]
    return sorted(found) == sorted(wanted)


def _all_by_blas() -> tuple[ProductSpeed, ...]:
    return tuple(
        ProductSpeed(dtype, size, rows, onednn=0.0, blas=0.0, blas_is_faster=True)
        for dtype in _DTYPES
        for size in _SHAPES
        for rows in ROWS
    )


# -- measuring -------------------------------------------------------------------------------------


def measure(
    clock: Callable[[], float] = time.perf_counter, cold_bytes: int = _COLD_BYTES
) -> tuple[ProductSpeed, ...]:
    """Time the products, in 64 to 128 MiB of memory.

    Args:
        clock: in seconds.
        cold_bytes: of the weights that are read in turn.
    """
    speeds: list[ProductSpeed] = []
    begun = clock()
    with torch.inference_mode():
        for name, dtype in _measured_dtypes().items():
            for size, shape in _SHAPES.items():
                weights = _weights(shape, dtype, cold_bytes)
                packed = [packed_order(weight) for weight in weights]
                gigabytes = sum(weight.nbytes for weight in weights) / 1e9
                for rows in ROWS:
                    if clock() - begun > _LONGEST_S:
                        return tuple(speeds)
                    x = torch.ones(rows, shape[1], dtype=dtype)
                    onednn, blas = _timed(x, weights, packed, clock)
                    faster = all(a > _GAIN * b for a, b in zip(onednn, blas, strict=True))
                    best = [gigabytes / max(min(times), 1e-9) for times in (onednn, blas)]
                    speeds.append(ProductSpeed(name, size, rows, best[0], best[1], faster))
    return tuple(speeds)


def _measured_dtypes() -> dict[Dtype, torch.dtype]:
    """Those of which there is a product to choose."""
    return {name: dtype for name, dtype in _DTYPES.items() if onednn_is_available(dtype)}


def _weights(shape: tuple[int, int], dtype: torch.dtype, size: int) -> list[Tensor]:
    count = max(1, size // (shape[0] * shape[1] * dtype.itemsize))
    return [torch.ones(shape, dtype=dtype) for _ in range(count)]


def _timed(
    x: Tensor, weights: list[Tensor], packed: list[Tensor | None], clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of reading all weights by oneDNN and by torch's own product, in rounds in which they
    take turns; not the first one, in which libraries prepare what they keep.
    """
    rounds = []
    for _ in range(1 + _ROUNDS):
        began = clock()
        for weight, ordered in zip(weights, packed, strict=True):
            onednn_linear(x, weight if ordered is None else ordered)
        between = clock()
        for weight in weights:
            torch.nn.functional.linear(x, weight)
        rounds.append((between - began, clock() - between))
    onednn, blas = zip(*rounds[1:], strict=True)
    return list(onednn), list(blas)
