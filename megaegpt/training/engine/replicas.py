"""Ranks that hold the same parameter must hold the same numbers; DeepSpeed checks none of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of
from megaegpt.parallel.partitions import held, is_partitioned
from megaegpt.parallel.together import all_reduce_max


def is_sharded(parameter: Tensor, grid: ProcessGrid) -> bool:
    """Whether TP ranks hold different slices of ``parameter``."""
    return grid.tp_size > 1 and spec_of(parameter).tp_dim is not None


def is_counted(parameter: Tensor, grid: ProcessGrid) -> bool:
    """Whether this rank's gradient is one beside those of the other tensor-parallel ranks."""
    return grid.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def assert_replicas_equal(model: nn.Module, grid: ProcessGrid) -> None:
    """Check every parameter bit for bit; collective over all ranks.

    Raises:
        AssertionError: on every rank; names the first parameter that differs anywhere.
    """
    parameters = dict(model.named_parameters())
    differs = [not _like_first_rank(parameter, grid) for parameter in parameters.values()]
    for name, found in zip(parameters, all_reduce_max(differs, grid), strict=True):
        if found:
            raise AssertionError(f"{name} differs between ranks that should hold the same")


def _like_first_rank(parameter: Tensor, grid: ProcessGrid) -> bool:
    groups = [] if is_partitioned(parameter) else [grid.replica_group]
    if not is_sharded(parameter, grid):
        groups.append(grid.tp_group)
    equal = True
    mine = held(parameter).detach()
    for group in filter(None, groups):
        first = mine.clone()
        dist.broadcast(first, src=dist.get_global_rank(group, 0), group=group)
        equal = equal and torch.equal(first, mine)
    return equal
