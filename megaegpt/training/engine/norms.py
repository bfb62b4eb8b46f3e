"""Gradients in pieces whose norms come out right in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

_MOST_NUMBERS = 2**20


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
