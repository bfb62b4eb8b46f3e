"""What a run does to DeepSpeed's ZeRO stage 3 beside its steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import Init
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import create_selective_checkpoint_contexts

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


def hide_gathers(engine: Any) -> None:
    """Keep what gathers parameters, and lets go of them, out of selective checkpoints' sight.

    Such a checkpoint counts the operators of a block's forward pass, and its recomputation has to
    ask for no more of them; but which parameters are there already differs from pass to pass.

    Args:
        engine: DeepSpeed's, of ZeRO stage 3.
    """
    offload = engine.optimizer.parameter_offload
    offload.pre_sub_module_forward_function = _unseen(offload.pre_sub_module_forward_function)
    offload.post_sub_module_forward_function = _unseen(offload.post_sub_module_forward_function)


def _unseen(hook: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Run the hook outside the dispatch mode of a selective checkpoint, but inside all others, of
    which one may count what is sent.
    """
    selective = tuple(map(type, create_selective_checkpoint_contexts([])))  # of each pass

    @functools.wraps(hook)
    def run(module: nn.Module) -> None:
        hides = isinstance(_get_current_dispatch_mode(), selective)
        with _pop_mode_temporarily() if hides else contextlib.nullcontext():
            hook(module)

    return run


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
