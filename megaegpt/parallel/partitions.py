"""Parameters that DeepSpeed's ZeRO stage 3 has cut over the ranks that would have copies of them.

DeepSpeed gathers what a module holds around its forward and its backward pass. Whatever else reads
or fills parameters does it here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether this rank holds a part of a parameter."""
    return hasattr(parameter, "ds_tensor")


def held(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: all of it, or its part, which is flat."""
    return getattr(parameter, "ds_tensor", parameter)


@torch.no_grad()
def fill(parameter: Any, values: Tensor) -> None:
    """Give a parameter new values, of its whole shape; each rank takes what it holds."""
    part = held(parameter)
    if part is parameter:
        parameter.copy_(values)
        return
    size, flat = part.numel(), values.reshape(-1)
    own = flat[dist.get_rank(parameter.ds_process_group) * size :][:size]
    part[: len(own)].copy_(own)
    if parameter.numel() == flat.numel():  # small ones stay whole beside their parts
        parameter.copy_(values)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Have whole parameters on every rank, which are only read. Collective, where some of them are
    partitioned.

    What is whole already stays so: DeepSpeed keeps small parameters whole, and has learned by then
    in which order passes gather the others.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    cut = [p for p in partitioned if p.ds_status is not ZeroParamStatus.AVAILABLE]  # type: ignore[attr-defined]
    with GatheredParameters(cut) if cut else contextlib.nullcontext():
        yield
