"""The gradient norm of a model and of each of its parts, wherever DeepSpeed keeps the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaegpt.model.parts import part_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.engine.norms import in_pieces, sum_of_squares
from megaegpt.training.engine.replicas import is_counted


class ModuleNorms:
    """Measures between the backward pass of the last micro-step and the update.

    Parameters carry ``tensor_model_parallel`` as for the global norm (``optimizer``).

    Args:
        model: parts without trainable parameters are left out.
        optimizer: DeepSpeed's, or the plain one of ZeRO stage 0.
        grid: sums go over its groups.
    """

    def __init__(self, model: nn.Module, optimizer: Any, grid: ProcessGrid) -> None:
        trainable = [(part_of(n), p) for n, p in model.named_parameters() if p.requires_grad]
        parts = list(dict.fromkeys(part for part, _ in trainable))
        self.names = [_label(part) for part in parts]
        """As in ``embeddings``, ``layer_00``, ``norm``."""
        self._parameters = [parameter for _, parameter in trainable]
        self._number = {id(parameter): parts.index(part) for part, parameter in trainable}
        self._optimizer = optimizer
        self._grid = grid

    @torch.no_grad()
    def measure(self, loss_scale: float) -> Tensor:
        """2-norms before clipping (parts,), on every rank. Collective."""
        grid = self._grid
        squares = torch.zeros(len(self.names), dtype=torch.float64, device=grid.device)
        for parameter, piece in self._pieces():
            if not is_counted(parameter, grid):
                continue
            for part in in_pieces([piece]):
                norm = torch.linalg.vector_norm(part, dtype=torch.float32)
                squares[self._number[id(parameter)]] += norm.double().square()
        self._add_up(squares)
        return squares.sqrt().float() / loss_scale

    @torch.no_grad()
    def total(self, loss_scale: float) -> Tensor:
        """2-norm of the whole gradient before clipping, a scalar, the same on every rank.
        Collective.
        """
        grid = self._grid
        counted = [piece for parameter, piece in self._pieces() if is_counted(parameter, grid)]
        square = sum_of_squares(counted, grid.device)
        self._add_up(square)
        return square.sqrt() / loss_scale

    @torch.no_grad()
    def spoil(self) -> None:
        """Let the gradient be infinite, so that DeepSpeed leaves out the update."""
        for parameter, piece in self._pieces():
            piece.view(-1)[:1] = torch.inf
            if norms := getattr(self._optimizer, "norm_for_param_grads", None):
                # Offloaded, it has been measured on the way to host memory.
                norms[self._optimizer.get_param_id(parameter)] = piece.norm()
            return

    def _add_up(self, squares: Tensor) -> None:
        """Sum up over the ranks that have other pieces."""
        grid = self._grid
        partitioned = hasattr(self._optimizer, "averaged_gradients")  # ZeRO stages 1, 2 and 3
        for group in (grid.tp_group, grid.replica_group if partitioned else None):
            if group is not None:
                dist.all_reduce(squares, group=group)

    def _pieces(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield this rank's piece of each gradient: under ZeRO its partition's, else the whole."""
        optimizer = self._optimizer
        if hasattr(optimizer, "get_fp32_grad_partitions"):  # stage 3
            for number, pieces in optimizer.get_fp32_grad_partitions().items():
                yield from zip(optimizer.fp16_groups[number], pieces.values(), strict=True)
        elif hasattr(optimizer, "averaged_gradients"):
            for number, parameters in enumerate(optimizer.params_in_partition):
                pieces = optimizer.averaged_gradients[number]
                filled = (g for g in pieces if not getattr(g, "_zero_padding", False))
                yield from zip(parameters, filled, strict=False)  # padding of an empty share
        elif hasattr(optimizer, "fp32_groups_gradients"):  # bf16 at stage 1
            for parameters, gradients in zip(
                optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True
            ):
                yield from zip(parameters, gradients, strict=True)
        else:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    yield parameter, parameter.grad


def _label(part: str) -> str:
    """A name that sorts and that TensorBoard accepts: ``layers:3`` -> ``layer_03``."""
    name, _, number = part.partition(":")
    return f"layer_{int(number):02d}" if number else name
