"""Cross-entropy of a vocabulary-parallel output head, without the (tokens x vocabulary) logits.

The head's product, the loss and both its gradients are computed together for a few hundred rows at
a time; only the gradients' own shapes are kept. At GPT-2's vocabulary the logits would be the
largest tensor of a step by far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.labels import IGNORE
from megaegpt.parallel.compiling import compile_problem
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.head_operators import into_gradient, softmax_sums
from megaegpt.parallel.matmul import linear
from megaegpt.parallel.vocabulary import check_targets

ROWS_AT_ONCE = {"cpu": 128, "cuda": 8192}
"""Rows of logits that exist at once, by device type, where operators make copies of them."""
LOGITS_AT_ONCE = 4 << 30
"""Bytes of logits that exist at once on a GPU whose head has fused operators, which make no copies.
Several portions cost an addition to the weight's gradient each, in fp32; an H100 holds 32,768 rows
of GPT-2's vocabulary in one."""
_SHARE_OF_MEMORY = 16
"""A smaller GPU's logits take no more than this part of its memory."""

_ELEMENTS_AT_ONCE = 1 << 20
"""Elements at once of a gradient that is scaled in a wider type than its own."""


@dataclass(frozen=True)
class LossOptions:
    """How logits become a loss."""

    rows: int | None = None
    """Most positions computed at once; None: as many as suit the device."""
    fused: bool | None = None
    """Whether the operators of ``parallel.head_operators`` compute what is between the products;
    None: on CUDA, where something can be compiled for it on every tensor-parallel rank."""
    memory: int | None = None
    """Bytes of the GPU's memory that fused operators choose ``rows`` by, where these are None; 0
    off CUDA. None: as much as the tensor-parallel rank with the least has."""
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)``."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's sum, which is in the gradients only."""
    backward_scale: Tensor | None = None
    """Factor on the loss in its backward pass, from :func:`power_of_two`.

    The gradients are ready, and rounded to the weights' type, before autograd knows of that
    multiplication. In fp16 numbers below 6e-8 are lost then, although a loss scale would have saved
    them. Told the scale, the loss has its power of two in the gradients before they are rounded.
    Whatever scale comes in the backward pass, the gradients are right. A loss in fp32 or fp64
    ignores it.
    """


def own_abilities(device: torch.device) -> tuple[bool, int]:
    """Whether the fused operators suit a device of this process, and the bytes of its memory that
    portions are chosen by.
    """
    if device.type != "cuda":
        return False, 0
    memory = torch.cuda.get_device_properties(device).total_memory
    return compile_problem("cuda") is None, memory


def with_all_ranks(options: LossOptions, device: torch.device, grid: ProcessGrid) -> LossOptions:
    """``options`` with what they leave to the device, so that all tensor-parallel ranks compute the
    same portions in the same way. Each portion is summed over the ranks: if one of them could not
    compile, or had less memory, and computed others, all would wait for ever.

    Collective over the tensor-parallel ranks, unless nothing is left.
    """
    portions_are_known = options.rows is not None or options.memory is not None
    if options.fused is not None and portions_are_known:
        return options
    fused, memory = own_abilities(device)
    if grid.tp_group is not None:
        least = torch.tensor([fused, memory])  # by gloo: the device has other work
        dist.all_reduce(least, dist.ReduceOp.MIN, group=grid.tp_group)
        fused, memory = least.tolist()
    return replace(
        options,
        fused=bool(fused) if options.fused is None else options.fused,
        memory=memory if options.memory is None else options.memory,
    )


def power_of_two(scale: Tensor) -> Tensor:
    """The power of two in a positive fp32 scalar: multiplied by it, nothing is rounded."""
    return scale / torch.frexp(scale).mantissa


class _Rows(NamedTuple):
    """Some rows of logits on their way to nats and gradients (n rows)."""

    nats: Tensor
    """(n,)"""
    exponentials: Tensor
    """(n, V/tp), exp(logit - the row's largest)"""
    sums: Tensor
    """(n, 1), of the exponentials over the whole vocabulary"""
    log_sums: Tensor
    """(n, 1), log of the sum of exp(logit)"""
    column: Tensor
    """(n, 1), this rank's column of each target; -1 where another rank holds it or there is none"""
    slope: Tensor | None
    """(n, V/tp), derivative of the soft cap; None without one"""

    def by_logits(self, by_nats: Tensor, by_z: Tensor | None) -> Tensor:
        """Gradient by the logits, (n, V/tp), in place of the exponentials.

        Args:
            by_nats: (n,) the loss's gradient by the nats of each row.
            by_z: (n,) what z-loss adds to the gradient by the log of each row's sum.
        """
        grad = self.exponentials.div_(self.sums)
        held, column = self.column >= 0, self.column.clamp(min=0)
        if by_z is None:
            grad.scatter_add_(1, column, -held.to(grad.dtype))
            grad.mul_(by_nats.unsqueeze(1))
        else:
            grad.mul_((by_nats + by_z).unsqueeze(1))
            grad.scatter_add_(1, column, -by_nats.unsqueeze(1) * held)
        return grad if self.slope is None else grad.mul_(self.slope)


class _FusedRows(NamedTuple):
    """The same from the operators of ``head_operators``, which leave the logits as they are."""

    nats: Tensor
    """(n,)"""
    logits: Tensor
    """(n, V/tp), as the product has given them"""
    largest: Tensor
    """(n, 1), the row's largest logit over the whole vocabulary"""
    sums: Tensor
    """(n, 1), of exp(logit - largest) over the whole vocabulary"""
    log_sums: Tensor
    """(n, 1), log of the sum of exp(logit)"""
    column: Tensor
    """(n, 1), this rank's column of each target; -1 where another rank holds it or there is none"""
    real: int
    """Columns from here on are padding."""
    softcap: float | None

    def by_logits(self, by_nats: Tensor, by_z: Tensor | None) -> Tensor:
        """Gradient by the logits, (n, V/tp), in place of them; arguments as of ``_Rows``."""
        by_log_sums = by_nats if by_z is None else by_nats + by_z
        into_gradient(
            self.logits,
            self.column,
            self.largest,
            self.sums,
            by_nats.unsqueeze(1),
            by_log_sums.unsqueeze(1),
            self.real,
            self.softcap,
        )
        return self.logits


def _rows(
    logits: Tensor, targets: Tensor, grid: ProcessGrid, vocab_size: int, softcap: float | None
) -> _Rows:
    """From logits (n, V/tp) in at least fp32, which are overwritten, and targets (n,), ``IGNORE``
    where nothing is predicted.
    """
    slope = None
    if softcap is not None:
        bounded = logits.div_(softcap).tanh_()
        slope = 1 - bounded.square()
        logits = bounded.mul_(softcap)
    columns = logits.shape[1]
    first = grid.tp_rank * columns
    if first + columns > vocab_size:
        logits[:, max(vocab_size - first, 0) :] = -torch.inf
    largest = logits.amax(dim=1, keepdim=True)  # (n, 1)
    if grid.tp_group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=grid.tp_group)
    logits.sub_(largest)
    column = _column_of(targets, first, columns)
    at_target = logits.gather(1, column.clamp(min=0)).masked_fill(column < 0, 0.0)  # (n, 1)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=1, keepdim=True)  # (n, 1)
    if grid.tp_group is not None:
        sums, at_target = _summed(sums, at_target, grid)
    log_sums = sums.log()
    nats = (log_sums - at_target).squeeze(1).masked_fill(targets == IGNORE, 0.0)
    return _Rows(nats, exponentials, sums, log_sums + largest, column, slope)


def _fused_rows(
    logits: Tensor, targets: Tensor, grid: ProcessGrid, vocab_size: int, softcap: float | None
) -> _FusedRows:
    """The same from logits in their own type."""
    columns = logits.shape[1]
    first = grid.tp_rank * columns
    real = min(max(vocab_size - first, 0), columns)
    column = _column_of(targets, first, columns)
    largest, sums, at_target = softmax_sums(logits, column, real, softcap)  # (n, 1) each
    if grid.tp_group is not None:
        own = largest
        largest = own.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=grid.tp_group)
        sums, at_target = _summed(sums * (own - largest).exp(), at_target, grid)
    log_sums = sums.log()
    nats = (log_sums - (at_target - largest)).squeeze(1).masked_fill(targets == IGNORE, 0.0)
    return _FusedRows(nats, logits, largest, sums, log_sums + largest, column, real, softcap)


def _column_of(targets: Tensor, first: int, columns: int) -> Tensor:
    """Targets (n,) -> (n, 1) where they are among the columns from ``first`` on; else -1."""
    column = targets.unsqueeze(1) - first
    return column.masked_fill((column < 0) | (column >= columns), -1)


def _summed(sums: Tensor, at_target: Tensor, grid: ProcessGrid) -> tuple[Tensor, ...]:
    """Two of (n, 1), each added up over the tensor-parallel ranks in one message."""
    both = torch.cat([sums, at_target], dim=1)
    dist.all_reduce(both, group=grid.tp_group)
    return both.split(1, dim=1)


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

    In a narrow type they are those of the loss times ``LossOptions.backward_scale``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        mixture: Tensor | None,
        grid: ProcessGrid,
        vocab_size: int,
        options: LossOptions,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        grad_mixture = None if mixture is None else torch.empty_like(mixture)
        total = hidden.new_zeros((), dtype=precise)
        expected = None if weight.dtype == precise else options.backward_scale
        for part in _parts(hidden, weight, options):
            x, y = hidden[part], targets[part]
            rows = _rows_of(x, weight, y, grid, vocab_size, options)
            nats, real = rows.nats, (y != IGNORE).to(precise)
            by_nats = real
            if mixture is not None and grad_mixture is not None:
                nats, by_nats, grad_mixture[part] = _mix(nats, y, mixture[part])
            total += nats.sum()
            if not (need_hidden or need_weight):
                continue
            by_z = real * (2 * options.z_loss) * rows.log_sums[:, 0] if options.z_loss else None
            if expected is not None:
                by_nats = by_nats * expected
                by_z = None if by_z is None else by_z * expected
            grad = rows.by_logits(by_nats, by_z).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = linear(grad, weight.t())
            if need_weight:
                grad_weight = _added(grad_weight, grad.t(), x, precise)
        if grad_hidden is not None and grid.tp_group is not None:
            dist.all_reduce(grad_hidden, group=grid.tp_group)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_mixture, expected)
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
        return grad_hidden, grad_weight, None, grad_mixture, None, None, None


class _MixedSum(torch.autograd.Function):
    """Sum of nats of known ones (n,) in a mixture (n, 2), differentiable by the mixture."""

    @staticmethod
    def forward(ctx: Any, nats: Tensor, targets: Tensor, mixture: Tensor) -> Tensor:
        mixed, _, by_mixture = _mix(nats, targets, mixture)
        ctx.save_for_backward(by_mixture)
        return mixed.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (by_mixture,) = ctx.saved_tensors
        return None, None, by_mixture * grads[0]


def _rows_of(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grid: ProcessGrid,
    vocab_size: int,
    options: LossOptions,
) -> _Rows | _FusedRows:
    """The rows of some positions, hidden (n, C), targets (n,)."""
    logits = linear(hidden, weight)
    if options.fused:
        return _fused_rows(logits, targets, grid, vocab_size, options.softcap)
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return _rows(logits.to(precise), targets, grid, vocab_size, options.softcap)


def _parts(hidden: Tensor, weight: Tensor, options: LossOptions) -> list[slice]:
    """The rows (n, C) that are computed together."""
    size = options.rows
    if size is None and options.fused and options.memory:
        size = fused_rows(weight.shape[0], weight.dtype, options.memory)
    size = size or ROWS_AT_ONCE.get(hidden.device.type, 1024)
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def fused_rows(columns: int, dtype: torch.dtype, memory: int) -> int:
    """Most rows of logits that a GPU's fused head computes at once, a power of two.

    Args:
        columns: a rank's part of the vocabulary.
        dtype: of the logits.
        memory: bytes of the GPU.
    """
    most = min(LOGITS_AT_ONCE, memory // _SHARE_OF_MEMORY) // (columns * dtype.itemsize)
    return 1 << max(most.bit_length() - 1, 0)


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
    """``total + a @ b`` in ``dtype``, in place; a first product stays in the type that it has."""
    if total is None:
        return a @ b
    if a.dtype == dtype:
        return total.addmm_(a, b)
    return total.to(dtype).add_(a @ b)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grid: ProcessGrid,
    vocab_size: int,
    reduction: Literal["sum", "none"] = "sum",
    options: LossOptions = LossOptions(),
    mixed_with: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy in nats of ``hidden @ weight.T`` against ``targets``.

    Args:
        hidden: (..., C), replicated over TP.
        weight: (V/tp, C), this rank's rows of the head; rows of padding tokens are masked out.
        targets: (...) token ids; ``IGNORE`` positions count 0.
        vocab_size: real tokens, without padding.
        reduction: ``sum``: a scalar to differentiate; ``none``: nats of each position, no gradient.
        mixed_with: (...) each, in at least fp32, both differentiable: the log of the share that the
            head's distribution has in the prediction, and what something else adds to the
            probability of each target.
        options: what they leave to the device the ranks agree on, anew in each call; a caller that
            has :func:`with_all_ranks` do it once spares the rest the waiting.

    Returns:
        fp32 (fp64 for fp64 inputs), identical on all TP ranks.

    Raises:
        DataError: targets of another shape, or one that is no token (on a GPU that is a device
            assertion, see ``parallel.vocabulary``).
    """
    check_targets(targets, hidden.shape[:-1], vocab_size)
    options = with_all_ranks(options, hidden.device, grid)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    mixture = None
    if mixed_with is not None:
        mixture = torch.stack([x.reshape(-1) for x in mixed_with], dim=1)  # (n, 2)
    if reduction == "sum":
        return _LinearCrossEntropySum.apply(
            flat, weight, flat_targets, mixture, grid, vocab_size, options
        )
    nats = _nats_of_rows(flat, weight, flat_targets, grid, vocab_size, options)
    if mixture is not None:
        nats, _, _ = _mix(nats, flat_targets, mixture)
    return nats.view(targets.shape)


def mixed_cross_entropy(
    log_probabilities: Tensor,
    targets: Tensor,
    mixed_with: tuple[Tensor, Tensor],
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """As :func:`linear_cross_entropy` where what the head gives each target is known already, and
    does not change: log-probabilities (...), any finite number where a target is ``IGNORE``.
    """
    targets_flat = targets.reshape(-1)
    mixture = torch.stack([x.reshape(-1) for x in mixed_with], dim=1)  # (n, 2)
    nats = -log_probabilities.reshape(-1).to(mixture.dtype)
    if reduction == "sum":
        return _MixedSum.apply(nats, targets_flat, mixture)
    with torch.no_grad():
        nats, _, _ = _mix(nats, targets_flat, mixture)
    return nats.view(targets.shape)


@torch.no_grad()
def _nats_of_rows(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grid: ProcessGrid,
    vocab_size: int,
    options: LossOptions,
) -> Tensor:
    """hidden (n, C), targets (n,) -> nats (n,)"""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    nats = torch.empty(len(hidden), dtype=precise, device=hidden.device)
    for part in _parts(hidden, weight, options):
        rows = _rows_of(hidden[part], weight, targets[part], grid, vocab_size, options)
        nats[part] = rows.nats
    return nats
