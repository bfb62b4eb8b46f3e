"""What a head computes between its two products, as two operators that read the logits once each.

Operator by operator the softmax, the loss and its gradient go over the logits eight times in fp32,
which at a vocabulary of 50,000 takes longer than the products. On CUDA both operators here are
compiled: logits are read as the product has written them, and their gradient takes their place.
They are operators of torch's so that counters, traces of memory and fake tensors see each as one.

Shapes: n rows, V columns, which are one rank's part of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compute_softmax_sums(
    logits: Tensor, column: Tensor, real: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`softmax_sums` does, as it is compiled."""
    logits, _ = _capped(logits, real, softcap)
    # Where all columns are padding the largest is finite too: no infinity is taken from another.
    largest = logits.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    sums = (logits - largest).exp().sum(dim=1, keepdim=True)
    return largest, sums, logits.gather(1, column.clamp(min=0)).masked_fill(column < 0, 0.0)


def compute_gradient(
    logits: Tensor,
    column: Tensor,
    largest: Tensor,
    sums: Tensor,
    by_nats: Tensor,
    by_log_sums: Tensor,
    real: int,
    softcap: float | None,
) -> None:
    """What :func:`into_gradient` does, as it is compiled."""
    capped, slope = _capped(logits, real, softcap)
    grad = (capped - largest).exp() * (by_log_sums / sums)
    columns = torch.arange(logits.shape[1], device=logits.device)
    grad = grad - torch.where(columns == column, by_nats, 0.0)
    logits.copy_(grad if slope is None else grad * slope)


def _capped(logits: Tensor, real: int, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """In at least fp32, with padding columns at minus infinity, and the derivative of a soft
    cap.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope = None
    if softcap is not None:
        bounded = (logits / softcap).tanh()
        logits, slope = bounded * softcap, 1 - bounded.square()
    if real < logits.shape[1]:
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.masked_fill(columns >= real, -torch.inf)
    return logits, slope


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@torch.library.custom_op(
    "megaegpt::softmax_sums",
    mutates_args=(),
    schema=(
        "(Tensor logits, Tensor column, SymInt real, float? softcap) -> (Tensor, Tensor, Tensor)"
    ),
)
def softmax_sums(
    logits: Tensor, column: Tensor, real: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce rows of logits, in at least fp32.

    Args:
        logits: (n, V).
        column: (n, 1) of each row's target; -1 where it is not among these columns.
        real: columns from here on are padding.
        softcap: see :class:`megaegpt.parallel.loss.LossOptions`.

    Returns:
        (n, 1) each: the largest logit of a row, the sum of ``exp(logit - largest)``, and the
        target's logit, or 0 where there is none.
    """
    function = _compiled(compute_softmax_sums) if logits.is_cuda else compute_softmax_sums
    return function(logits, column, real, softcap)


@softmax_sums.register_fake
def _(
    logits: Tensor, column: Tensor, real: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    largest, sums, at_target = (logits.new_empty(len(logits), 1, dtype=dtype) for _ in range(3))
    return largest, sums, at_target


@torch.library.custom_op(
    "megaegpt::into_gradient",
    mutates_args=("logits",),
    schema=(
        "(Tensor(a!) logits, Tensor column, Tensor largest, Tensor sums, Tensor by_nats, "
        "Tensor by_log_sums, SymInt real, float? softcap) -> ()"
    ),
)
def into_gradient(
    logits: Tensor,
    column: Tensor,
    largest: Tensor,
    sums: Tensor,
    by_nats: Tensor,
    by_log_sums: Tensor,
    real: int,
    softcap: float | None,
) -> None:
    """Replace rows of logits by the loss's gradient by them, rounded to their type once.

    Args:
        logits: (n, V), which are overwritten; ``column``, ``real`` and ``softcap`` are those of
            :func:`softmax_sums`.
        largest: (n, 1) over the whole vocabulary.
        sums: (n, 1) of ``exp(logit - largest)`` over the whole vocabulary.
        by_nats: (n, 1) the loss's gradient by the nats of each row.
        by_log_sums: (n, 1) and by the log of its sum: the same, and what a z-loss adds.
    """
    function = _compiled(compute_gradient) if logits.is_cuda else compute_gradient
    function(logits, column, largest, sums, by_nats, by_log_sums, real, softcap)


@into_gradient.register_fake
def _(*arguments: Any) -> None:
    return None
