"""What to do where a device's memory was not enough, and by how much each remedy helps."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.validation import find_problems
from megaegpt.errors import MegaEGPTError, TrainingError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.memory import estimate_memory
from megaegpt.precision import Precision
from megaegpt.training.logging.memory_snapshot import MemorySnapshot

_OTHER_TEXTS = re.compile(
    r"DefaultCPUAllocator: (can't|not enough)|CUDA error: out of memory|_ALLOC_FAILED"
    r"|Cannot allocate memory"
)
"""In errors that have no class of their own: of torch's allocator on a CPU, of CUDA's libraries,
which allocate beside torch, and of the operating system."""

_SHOWN = 3


@contextlib.contextmanager
def explaining_memory(
    config: RunConfig,
    grid: ProcessGrid,
    encoder: ModelConfig | None,
    precision: Precision,
    snapshot: MemorySnapshot,
    sample_tokens: int | None = None,
) -> Iterator[None]:
    """Turn a device's lack of memory into an error that says which settings help.

    Args:
        config: the run.
        grid: its processes.
        encoder: the frozen GPT under egpt and deepgpt.
        precision: what ``auto`` has become.
        snapshot: what it has to tell of a GPU is part of the error.
        sample_tokens: of the longest sample there is; None: as long as the model's samples are.

    Raises:
        TrainingError: on the rank that had too little.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        written = snapshot.write()  # before anything else is done on the device
        lines = [*describe(config, grid, encoder, precision, sample_tokens), *written]
        # Its first line says what was asked for; the rest is torch's own stack.
        reason = (str(error).splitlines() or ["an allocation failed"])[0].strip()
        message = [f"{grid.device} has too little memory: {reason}", *lines]
        raise TrainingError("\n".join(message)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_OTHER_TEXTS.search(str(error)))


def describe(
    config: RunConfig,
    grid: ProcessGrid,
    encoder: ModelConfig | None,
    precision: Precision,
    sample_tokens: int | None = None,
) -> list[str]:
    """The estimate of a rank's memory, and the settings that lower it most, the best first;
    arguments as above.
    """
    kind = grid.device.type

    def bytes_of(changed: RunConfig) -> int:
        return estimate_memory(changed, grid.dp_size, precision, encoder, kind, sample_tokens).total

    try:
        now = bytes_of(config)
        gains = {text: now - bytes_of(changed) for text, changed in remedies(config, grid)}
    except (MegaEGPTError, RuntimeError, ValueError):  # an explanation must not hide the error
        return ["  tools/plan.py says what a run needs"]
    lines = [f"  a step of this run needs about {_gib(now)} a rank by the plan; what lowers that:"]
    best = sorted(gains.items(), key=lambda item: -item[1])
    lines += [f"  - {text}: {_gib(gain)} less" for text, gain in best[:_SHOWN] if gain > 0]
    if len(lines) == 1:
        lines[0] = f"  a step of this run needs about {_gib(now)} a rank by the plan"
    return [*lines, "  the batch of a step stays what it is, and --resume goes on with any of them"]


def remedies(config: RunConfig, grid: ProcessGrid) -> Iterator[tuple[str, RunConfig]]:
    """Settings that need less memory for the same training, as ``key=value``, on as many ranks;
    of them, those that the rest of the configuration can be run with.
    """

    def problems(candidate: RunConfig) -> set[tuple[str, ...]]:
        return {tuple(problem.keys) for problem in find_problems(candidate, grid.world_size)}

    before = problems(config)
    for text, changed in _candidates(config, grid):
        if problems(changed) <= before:
            yield text, changed


def _candidates(config: RunConfig, grid: ProcessGrid) -> Iterator[tuple[str, RunConfig]]:
    def changed(section: str, **values: Any) -> tuple[str, RunConfig]:
        shown = " ".join(f"{section}.{name}={value}" for name, value in values.items())
        part = dataclasses.replace(getattr(config, section), **values)
        return shown, dataclasses.replace(config, **{section: part})

    if (size := config.training.chosen_micro_batch_size) > 1:
        yield changed("training", micro_batch_size=_smaller(size))
    for kind in ("selective", "full"):
        if kind != config.training.activation_checkpointing != "full":
            yield changed("training", activation_checkpointing=kind)
    if config.parallel.zero_stage < 2 and grid.replica_size > 1:
        yield changed("parallel", zero_stage=2)
    if config.optimizer.kind == "adamw" and not config.training.compile:
        if config.parallel.zero_stage < 3 and grid.replica_size > 1:
            yield changed("parallel", zero_stage=3)
        if config.parallel.offload == "none" and grid.device.type != "cpu":
            yield changed("parallel", zero_stage=3, offload="optimizer")


def _smaller(size: int) -> int:
    """The largest smaller micro-batch that divides whatever ``size`` does."""
    return next(size // n for n in range(2, size + 1) if size % n == 0)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
