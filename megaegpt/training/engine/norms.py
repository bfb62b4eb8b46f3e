"""Sums of the squares of gradients, exact enough for tensors of any size and quick on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_MOST_NUMBERS = 2**20
_CONVERTED_AT_ONCE = 2**16


def in_pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors, on a CPU in pieces, for norms whose squares are then added up.

    A CPU adds the squares of a tensor to one number after the other. In fp32 that soon grows too
    slowly: the norm of 150 million normally distributed numbers is 2% too small, that of pieces
    0.001%. Adding up in fp64 takes twenty times as long.
    """
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel() > _MOST_NUMBERS:
            yield from tensor.flatten().split(_MOST_NUMBERS)
        else:
            yield tensor


def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of the squares of tensors that lie on one device, in fp64, a scalar on ``device``.

    Of large ones on a CPU it is one of products of short pieces in fp64: torch's norm in fp64, one
    number after the other, takes five times as long (233 and 39 ms for 62 million numbers on one
    core).
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    by_norm = []
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel() > _CONVERTED_AT_ONCE:
            total += _sum_by_pieces(tensor.flatten())
        else:
            by_norm.append(tensor)
    if by_norm:
        total += torch.stack(torch._foreach_norm(by_norm, 2, torch.float64)).square().sum()
    return total


def _sum_by_pieces(numbers: Tensor) -> Tensor:
    buffer = torch.empty(_CONVERTED_AT_ONCE, dtype=torch.float64)
    pieces = (buffer[: len(part)].copy_(part) for part in numbers.split(_CONVERTED_AT_ONCE))
    return torch.stack([piece.dot(piece) for piece in pieces]).sum()
