"""DeepSpeed's loops over parameters on the way to an update, as a few operators over all of them.

Between the backward pass and the update a GPU waits for its host: 19 operators a parameter at stage
2 and 4 at stage 1, of which a model of 48 blocks has 580. The methods that are replaced here look
for gradients that are not finite, take their norm, add them up in fp32 and clip them. What comes
out is the same; ``docs/benchmarks.md`` has the counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.engine.norms import in_pieces, sum_of_squares
from megaegpt.training.engine.replicas import is_counted


def use_fewer_operators(optimizer: Any, grid: ProcessGrid) -> None:
    """Replace the methods of one of DeepSpeed's optimizers; others, stage 3's among them, are
    left as they are.

    Parameters carry ``tensor_model_parallel`` as for the global norm
    (:func:`~megaegpt.training.engine.optimizer.gradient_norm`).

    Args:
        optimizer: of ZeRO stage 1 or 2, which ``training.engine.compat`` has looked at.
        grid: norms are summed over its groups.
    """
    if hasattr(optimizer, "params_in_partition"):
        # The norm of gradients that are not all finite is not finite, and is looked at anyway.
        optimizer.has_overflow = _finds_nothing
        optimizer.get_grad_norm_direct = functools.partial(_norm_of_partition, grid)
    elif hasattr(optimizer, "fp32_groups_gradients"):  # bf16 at stage 1
        optimizer.update_hp_grads = functools.partial(_add_to_fp32, optimizer)
        optimizer.get_grads_for_norm = functools.partial(_for_norm_or_clipping, optimizer, grid)


def _finds_nothing(partition_gradients: bool = True) -> bool:
    return False


def _norm_of_partition(
    grid: ProcessGrid, gradients: Iterable[Tensor], parameters: Iterable[Tensor]
) -> Tensor:
    """2-norm of one group's gradients, of which this rank has a partition: not finite where one of
    them is not. Collective.
    """
    real = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    counted: list[Tensor] = []
    others: list[Tensor] = []
    for gradient, parameter in zip(real, parameters, strict=False):  # padding of an empty share
        (counted if is_counted(parameter, grid) else others).append(gradient)
    total = sum_of_squares(counted, grid.device).float()
    if others:  # not counted, but none of them may be infinite
        total += 0.0 * sum_of_squares(others, grid.device).float()
    for group in (grid.replica_group, grid.tp_group):
        if group is not None:
            dist.all_reduce(total, group=group)
    return total.sqrt()


@torch.no_grad()
def _add_to_fp32(optimizer: Any, clear_lp_grads: bool = False) -> None:
    """Add the micro-step's bf16 gradients to the fp32 ones."""
    sums, gradients = [], []
    for number, parameters in enumerate(optimizer.bf16_groups):
        has_gradients = optimizer.fp32_groups_has_gradients[number]
        for place, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            total = optimizer.fp32_groups_gradients[number][place]
            parameter._hp_grad = total
            has_gradients[place] = True
            sums.append(total.view(parameter.shape))
            gradients.append(parameter.grad)
    if sums:
        torch._foreach_add_(sums, gradients)
        if clear_lp_grads:
            torch._foreach_zero_(gradients)


def _for_norm_or_clipping(
    optimizer: Any, grid: ProcessGrid, for_clipping: bool = False
) -> list[Tensor] | tuple[list[Tensor], dict[str, list[Tensor]]]:
    """What DeepSpeed multiplies to clip: the rank's partition, the rest being zeroed unused. Or
    what it takes the norm of (and, of experts, there is nothing): one number, whose norm is itself.
    """
    if for_clipping:
        return list(optimizer.fp32_groups_gradient_flat_partition)
    counted = [
        optimizer.fp32_groups_gradients[number][place]
        for number, parameters in enumerate(optimizer.bf16_groups)
        for place, parameter in enumerate(parameters)
        if optimizer.fp32_groups_has_gradients[number][place] and is_counted(parameter, grid)
    ]
    if not counted:
        return [torch.zeros((), device=grid.device)], {}
    norms = torch._foreach_norm([*in_pieces(counted)], 2, torch.float32)
    return [torch.stack(norms).square().sum().sqrt()], {}
