"""What a run does to DeepSpeed's ZeRO stage 3 beside its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import Init
from torch import nn

from megaegpt.parallel.grid import DeepSpeedMpu
from megaegpt.parallel.partitions import gathered


def partition(
    model: nn.Module, dtype: torch.dtype, mpu: DeepSpeedMpu, options: dict[str, Any]
) -> None:
    """Cut a model's parameters over the ranks that would have copies of it, one after the other, so
    that a GPU never holds more than its part and one parameter. Collective.

    Args:
        model: whole, on whatever device.
        dtype: of the computation; parameters are cast to it, but not to fp32, which they have.
        options: DeepSpeed's configuration.
    """
    for parameter in model.parameters():
        if dtype != torch.float32:
            parameter.data = parameter.data.to(dtype)
    deepspeed.comm.init_distributed(verbose=False)  # or it would read the batch as that of one rank
    Init(
        module=model,
        data_parallel_group=mpu.get_data_parallel_group(),
        config_dict_or_path=options,
        mpu=mpu,
    )


@contextlib.contextmanager
def without_hooks(engine: Any) -> Iterator[None]:
    """Have the whole model on every rank, and no module let go of its parameters after its pass:
    for passes that other ranks do not take part in. Collective.

    Args:
        engine: DeepSpeed's, of ZeRO stage 3.
    """
    offload = engine.optimizer.parameter_offload
    with gathered(engine.module.parameters()):
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
