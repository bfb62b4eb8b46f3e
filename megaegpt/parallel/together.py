"""How ranks agree to stop: a failure or a signal on one rank must end the run on all of them.

A rank that leaves a collective alone makes the others wait for the back-end's timeout (minutes). So
what can fail on one rank (reading data, writing files, signals) is asked for at points that every
rank passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megaegpt import errors
from megaegpt.errors import MegaEGPTError
from megaegpt.parallel.grid import ProcessGrid

T = TypeVar("T")


class OtherRankError(RuntimeError):
    """This rank stops because another one met a bug, whose traceback that one shows."""


def all_reduce_max(values: Sequence[int], grid: ProcessGrid) -> list[int]:
    """The element-wise maximum over all ranks. Collective, on the CPU: no device is waited for."""
    return start_all_reduce_max(values, grid)()


def start_all_reduce_max(values: Sequence[int], grid: ProcessGrid) -> Callable[[], list[int]]:
    """Begin :func:`all_reduce_max`, which goes on beside whatever this process does.

    Returns:
        What waits for the end and gives the result; every rank must call it.
    """
    largest = torch.tensor(values, dtype=torch.int64)
    if grid.world_size == 1:
        return largest.tolist
    work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=grid.control_group, async_op=True)

    def result() -> list[int]:
        work.wait()
        return largest.tolist()

    return result


def broadcast_object(make: Callable[[], T], grid: ProcessGrid) -> T:
    """Call ``make`` on rank 0 alone and return its result on every rank. Collective.

    Raises:
        Exception: whatever ``make`` raises, on every rank as :func:`raising_together` does.
    """
    if grid.world_size == 1:
        return make()
    box: list[Any] = [None, None]
    error: Exception | None = None
    if grid.is_main:
        try:
            box[0] = make()
        except Exception as caught:
            error = caught
            box[1] = _report(caught)
    dist.broadcast_object_list(box, src=0, group=grid.control_group)
    value, report = box
    if report is not None:
        raise _seen_everywhere(error, 0, *report)
    return value


def all_gather_object(value: T, grid: ProcessGrid) -> list[T]:
    """Every rank's value, by rank. Collective."""
    if grid.world_size == 1:
        return [value]
    values = [value] * grid.world_size
    dist.all_gather_object(values, value, group=grid.control_group)
    return values


@contextlib.contextmanager
def raising_together(grid: ProcessGrid) -> Iterator[None]:
    """If the block raises on some rank, it raises on every rank. Collective at the block's end.

    The block itself must not communicate between ranks that may fail apart. A rank that failed
    raises its own error. The others raise the first failing rank's, which for a
    :class:`MegaEGPTError` means the same class and message, shown once, by rank 0.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error, grid)


def raise_together(error: Exception | None, grid: ProcessGrid) -> None:
    """Raise on every rank if any rank has an error, else return. Collective."""
    if grid.world_size == 1:
        if error is not None:
            raise error
        return
    if not all_reduce_max([error is not None], grid)[0]:
        return
    reports = all_gather_object(None if error is None else _report(error), grid)
    rank, report = next((rank, report) for rank, report in enumerate(reports) if report)
    raise _seen_everywhere(error, rank, *report)


def _report(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _seen_everywhere(error: Exception | None, rank: int, kind: str, message: str) -> Exception:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, MegaEGPTError):
        shared = error if isinstance(error, MegaEGPTError) else known(f"rank {rank}: {message}")
        shared.on_every_rank = True
        return shared
    return error or OtherRankError(f"rank {rank} failed: {kind}: {message}")
