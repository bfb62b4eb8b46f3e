"""Randomness without state: a micro-step's dropout is a function of (seed, step, micro-step, dp
rank).

All ranks of a TP group draw the same numbers for replicated activations. Where activations are
sharded, :func:`sharded_rng` derives a stream of each rank's own from that common stream, so that
restoring the common stream (as torch's checkpoint does before it recomputes) restores both, and
nothing needs to be saved.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from megaegpt.parallel.grid import ProcessGrid

_CUDA_OFFSET_STEP = 4  # Philox offsets are multiples of 4


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any integers and names; unrelated for unequal parts."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_micro_step(seed: int, step: int, micro_step: int, dp_rank: int) -> None:
    """Set torch's default generators (CPU and the current GPU) for one forward and backward
    pass.
    """
    torch.manual_seed(derive_seed("micro-step", seed, step, micro_step, dp_rank))


def sharded_rng(grid: ProcessGrid) -> AbstractContextManager[None]:
    """Inside, random numbers differ between TP ranks; outside, the common stream goes on in
    step.
    """
    if grid.tp_group is None:
        return contextlib.nullcontext()
    return _own_stream(grid.device, "tp", grid.tp_rank)


def context_rng(grid: ProcessGrid) -> AbstractContextManager[None]:
    """Inside, random numbers differ between context-parallel ranks, which have other tokens; the
    ranks of a TP group still draw the same.
    """
    if grid.cp_group is None:
        return contextlib.nullcontext()
    return _own_stream(grid.device, "cp", grid.cp_rank)


@contextlib.contextmanager
def _own_stream(device: torch.device, name: str, rank: int) -> Iterator[None]:
    """A stream that follows from the common one, which goes on in step on all ranks."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.manual_seed(derive_seed(name, seed, offset, rank))
        try:
            yield
        finally:
            generator.manual_seed(seed)
            generator.set_offset(offset + _CUDA_OFFSET_STEP)
        return
    drawn = torch.randint(2**62, (), dtype=torch.int64)
    if type(drawn) is not torch.Tensor:  # a fake one: shapes alone are traced, nothing is random
        yield
        return
    common = int(drawn)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(name, common, rank))
    try:
        yield
    finally:
        torch.set_rng_state(state)
