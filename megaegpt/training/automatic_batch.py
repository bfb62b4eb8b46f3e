"""``training.micro_batch_size: auto`` becomes a number that all ranks of a run agree on."""

from __future__ import annotations

import torch

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.interop.sources import resolve_weights_source
from megaegpt.parallel.affinity import machine
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_gather_object, broadcast_object
from megaegpt.planning.dry_step import dry_step
from megaegpt.planning.hardware import USABLE_MEMORY, available_memory
from megaegpt.planning.memory import held_in_backward, peak_of_step, trace_rank
from megaegpt.planning.micro_batch import (
    CPU_TOKENS,
    MemoryLimit,
    MicroBatchChoice,
    gib,
    largest_that_fits,
    possible_sizes,
    with_micro_batch,
)
from megaegpt.precision import Precision
from megaegpt.training.feature_stores import find_encoder
from megaegpt.training.memory_error import is_out_of_memory

CPU_SHARE = 0.7
"""Share of a machine's free memory that its ranks may fill: under ZeRO-2 a process grows by a third
beyond its tensors (docs/benchmarks.md)."""


def settle_micro_batch(
    config: RunConfig,
    grid: ProcessGrid,
    precision: Precision,
    sample_tokens: int,
    recorded: int | None,
    notices: list[str],
) -> RunConfig:
    """The run with a number for ``auto``: the one it had so far, or the largest that fits every
    rank. Collective.

    Args:
        config: of the run, whose batch divides among the ranks.
        precision: what ``auto`` has become.
        sample_tokens: of the longest sample there is.
        recorded: the number in the checkpoint that the run goes on from; None: it is a new run.
        notices: what was chosen, and why, is added.
    """
    if config.training.micro_batch_size != "auto":
        return config
    key = "training.micro_batch_size=auto"
    if recorded is not None:
        if recorded in possible_sizes(config, grid.dp_size):
            notices.append(f"{key} stays {recorded}, as in the checkpoint")
            return with_micro_batch(config, recorded)
        notices.append(
            f"{key} cannot stay {recorded}, as in the checkpoint: it does not divide a rank's "
            f"samples on {grid.dp_size} data-parallel ranks"
        )
    encoder = _encoder(config, grid)
    limits = all_gather_object(memory_limit(grid.device, len(_ranks_here(grid))), grid)
    limit = min(limits, key=lambda found: found.size)
    kind = grid.device.type
    choice = broadcast_object(
        lambda: largest_that_fits(
            config, grid.dp_size, precision, limit, encoder, kind, sample_tokens
        ),
        grid,
    )
    # A dry step has all weights on each GPU, of which stage 3 leaves a rank a part.
    if kind == "cuda" and config.parallel.zero_stage < 3:
        choice = _tried(config, grid, precision, encoder, sample_tokens, choice)
    notices.append(str(choice))
    return with_micro_batch(config, choice.size)


def memory_limit(device: torch.device, ranks_here: int) -> MemoryLimit:
    """What a rank may take of its GPU, or of this machine's memory beside its neighbours.

    Args:
        ranks_here: that share this machine's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return MemoryLimit(
            int(USABLE_MEMORY * free), f"{USABLE_MEMORY:.0%} of what its GPU has free"
        )
    size = int(CPU_SHARE * available_memory()) // ranks_here
    others = "" if ranks_here == 1 else f" among {ranks_here} ranks"
    source = f"{CPU_SHARE:.0%} of what this machine has free{others}"
    return MemoryLimit(size, source, CPU_TOKENS)


def _ranks_here(grid: ProcessGrid) -> list[int]:
    """Ranks on this machine. Collective."""
    machines = all_gather_object(machine(), grid)
    return [rank for rank, other in enumerate(machines) if other == machines[grid.rank]]


def _encoder(config: RunConfig, grid: ProcessGrid) -> ModelConfig | None:
    """The architecture of the encoder, which is fetched where it is not on this machine."""
    source = config.model.encoder.source
    if not config.model.needs_encoder or source is None:
        return None
    resolve_weights_source(source, grid)
    return find_encoder(config)


def _tried(
    config: RunConfig,
    grid: ProcessGrid,
    precision: Precision,
    encoder: ModelConfig | None,
    sample_tokens: int,
    choice: MicroBatchChoice,
) -> MicroBatchChoice:
    """The largest number up to the plan's of which a dry step fits every rank's GPU. Collective."""
    bound, limit = choice.bound, choice.limit.size
    sizes = [n for n in possible_sizes(config, grid.dp_size) if n <= choice.size]
    for size in reversed(sizes):
        run = with_micro_batch(config, size)
        step = trace_rank(run, grid.dp_size, precision, encoder, "cuda", sample_tokens)
        beside = held_in_backward(run, grid.dp_size, precision, step)
        own = _measure(run, grid, precision, encoder, beside, sample_tokens)
        found = all_gather_object(own, grid)
        taken = [one for one in found if one is not None]
        if size == 1 or (len(taken) == len(found) and max(taken) <= limit):
            break
        did = f"takes {gib(max(taken))}" if len(taken) == len(found) else "does not fit"
        bound = f"{size} {did} in a dry step"
    predicted = peak_of_step(run, grid.dp_size, precision, step).total
    measured = max(taken, default=None)
    return MicroBatchChoice(size, predicted, choice.limit, bound, measured)


def _measure(
    config: RunConfig,
    grid: ProcessGrid,
    precision: Precision,
    encoder: ModelConfig | None,
    beside: int,
    sample_tokens: int,
) -> int | None:
    """Bytes of a dry step on this rank's GPU; None: it has too few."""
    try:
        return dry_step(
            config, grid.dp_size, precision, encoder, grid.device, beside, sample_tokens
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
