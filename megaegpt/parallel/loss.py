"""Cross-entropy of a vocabulary-parallel output head, without the (tokens x vocabulary) logits.

The head's product, the loss and both its gradients are computed together for a few hundred rows at
a time; only the gradients' own shapes are kept. At GPT-2's vocabulary the logits would be the
largest tensor of a step by far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.labels import IGNORE
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.matmul import linear
from megaegpt.parallel.vocabulary import check_targets

ROWS_AT_ONCE = {"cpu": 128, "cuda": 4096}
"""Rows of logits that exist at once, by device type."""

_ELEMENTS_AT_ONCE = 1 << 20
"""Elements at once of a gradient that is scaled in a wider type than its own."""

_backward_scale: ContextVar[Tensor | None] = ContextVar("backward_scale", default=None)
"""A power of two."""


@contextlib.contextmanager
def backward_scale(scale: Tensor) -> Iterator[None]:
    """Inside, losses are computed that will be multiplied by ``scale`` for their backward pass.

    The gradients are ready, and rounded to the weights' type, before autograd knows of that
    multiplication. In fp16 numbers below 6e-8 are lost then, although a loss scale would have saved
    them. Told the scale, the loss has its power of two in the gradients before they are rounded.
    Whatever scale comes in the backward pass, the gradients are right.

    Args:
        scale: a positive fp32 scalar on the loss's device; a loss in fp32 or fp64 ignores it.
    """
    power = scale / torch.frexp(scale).mantissa  # exact: multiplied by it, nothing is rounded
    token = _backward_scale.set(power)
    try:
        yield
    finally:
        _backward_scale.reset(token)


def _chunk_nats(
    logits: Tensor, targets: Tensor, grid: ProcessGrid, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nats of each row and what the gradient needs.

    Args:
        logits: (n, V/tp) in at least fp32; overwritten with exp(logit - max).
        targets: (n,) token ids, ``IGNORE`` where nothing is predicted.

    Returns:
        nats (n,), exponentials (n, V/tp), their sums over the whole vocabulary (n, 1), and this
        rank's column of each target (n, 1), or -1 where another rank holds it or there is none.
    """
    columns = logits.shape[1]
    first = grid.tp_rank * columns
    if first + columns > vocab_size:
        logits[:, max(vocab_size - first, 0) :] = -torch.inf
    largest = logits.amax(dim=1, keepdim=True)  # (n, 1)
    if grid.tp_group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=grid.tp_group)
    logits.sub_(largest)
    column = targets.unsqueeze(1) - first  # (n, 1)
    column = column.masked_fill((column < 0) | (column >= columns), -1)
    at_target = logits.gather(1, column.clamp(min=0)).masked_fill(column < 0, 0.0)  # (n, 1)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=1, keepdim=True)  # (n, 1)
    if grid.tp_group is not None:
        both = torch.cat([sums, at_target], dim=1)
        dist.all_reduce(both, group=grid.tp_group)
        sums, at_target = both.split(1, dim=1)
    nats = (sums.log() - at_target).squeeze(1)
    return nats.masked_fill(targets == IGNORE, 0.0), exponentials, sums, column


def _mix(nats: Tensor, targets: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nats (n,) of ``keep * exp(-nats) + added``, where mixture (n, 2) is log(keep) and added, and
    their gradients by nats (n,) and by mixture (n, 2).
    """
    log_keep, added = mixture.unbind(1)
    kept, real = log_keep - nats, targets != IGNORE
    mixed = torch.logaddexp(kept, added.log())
    share = (kept - mixed).exp() * real
    # Where nothing is added nothing can be, and the factor may overflow.
    by_added = (-mixed).exp().masked_fill(added == 0, 0.0) * real
    return -mixed.masked_fill(~real, 0.0), share, torch.stack([-share, -by_added], dim=1)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum of nats; the gradients are ready after forward and only scaled in backward.

    In a narrow type they are those of the loss times the power of two of ``backward_scale``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        grid: ProcessGrid,
        vocab_size: int,
        rows: int,
        mixture: Tensor | None,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        grad_mixture = None if mixture is None else torch.empty_like(mixture)
        total = hidden.new_zeros((), dtype=precise)
        expected = None if weight.dtype == precise else _backward_scale.get()
        for start in range(0, hidden.shape[0], rows):
            x, y = hidden[start : start + rows], targets[start : start + rows]
            nats, grad, sums, column = _chunk_nats(
                linear(x, weight).to(precise), y, grid, vocab_size
            )
            by_nats = (y != IGNORE).to(precise)
            if mixture is not None and grad_mixture is not None:
                part = slice(start, start + rows)
                nats, by_nats, grad_mixture[part] = _mix(nats, y, mixture[part])
            total += nats.sum()
            if not (need_hidden or need_weight):
                continue
            grad.div_(sums)
            grad.scatter_add_(1, column.clamp(min=0), -(column >= 0).to(grad.dtype))
            by_loss = by_nats if expected is None else by_nats * expected
            grad.mul_(by_loss.unsqueeze(1))
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = linear(grad, weight.t())
            if need_weight:
                grad_weight = _added(grad_weight, grad.t(), x, precise)
        if grad_hidden is not None and grid.tp_group is not None:
            dist.all_reduce(grad_hidden, group=grid.tp_group)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            grad_mixture,
            expected,
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second backward pass is refused, as after any such change.
        scale = grads[0]
        grad_hidden, grad_weight, grad_mixture, expected = ctx.saved_tensors
        rest = scale if expected is None else scale / expected
        for grad, factor in ((grad_hidden, rest), (grad_weight, rest), (grad_mixture, scale)):
            if grad is not None:
                _scale(grad, factor)
        return grad_hidden, grad_weight, None, None, None, None, grad_mixture


def _scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply by a scalar in place, in the scalar's type: rounded to a narrow type first, it would
    make all gradients too large or too small by one and the same factor.
    """
    if grad.dtype == factor.dtype:
        grad.mul_(factor)
        return
    for part in grad.split(max(_ELEMENTS_AT_ONCE // grad.shape[1], 1)):
        part.mul_(factor.reshape(1))  # torch computes in the wider type of two that have dimensions


def _added(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` in ``dtype``, in place."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grid: ProcessGrid,
    vocab_size: int,
    reduction: Literal["sum", "none"] = "sum",
    rows: int | None = None,
    mixed_with: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy in nats of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: (..., C), replicated over TP.
        weight: (V/tp, C), this rank's rows of the head; rows of padding tokens are masked out.
        targets: (...) token ids; ``IGNORE`` positions count 0.
        vocab_size: real tokens, without padding.
        reduction: ``sum``: a scalar to differentiate; ``none``: nats of each position, no gradient.
        rows: positions computed at once (default: by device).
        mixed_with: (...) each, in at least fp32, both differentiable: the log of the share that the
            head's distribution has in the prediction, and what something else adds to the
            probability of each target.

    Returns:
        fp32 (fp64 for fp64 inputs), identical on all TP ranks.

    Raises:
        DataError: targets of another shape, or one that is no token (on a GPU that is a device
            assertion, see ``parallel.vocabulary``).
    """
    check_targets(targets, hidden.shape[:-1], vocab_size)
    rows = rows or ROWS_AT_ONCE.get(hidden.device.type, 1024)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    mixture = None
    if mixed_with is not None:
        mixture = torch.stack([x.reshape(-1) for x in mixed_with], dim=1)  # (n, 2)
    if reduction == "sum":
        return _LinearCrossEntropySum.apply(
            flat, weight, flat_targets, grid, vocab_size, rows, mixture
        )
    with torch.no_grad():
        precise = torch.promote_types(hidden.dtype, torch.float32)
        nats = torch.cat(
            [
                _chunk_nats(linear(x, weight).to(precise), y, grid, vocab_size)[0]
                for x, y in zip(flat.split(rows), flat_targets.split(rows), strict=True)
            ]
        )
        if mixture is not None:
            nats, _, _ = _mix(nats, flat_targets, mixture)
    return nats.view(targets.shape)
