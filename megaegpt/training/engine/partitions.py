"""What a run does to DeepSpeed's ZeRO stage 3 beside its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megaegpt.parallel.partitions import gathered


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


@contextlib.contextmanager
def torchs_own_linear() -> Iterator[None]:
    """Take back at the end what DeepSpeed does to ``torch.nn.functional.linear`` at stage 3.

    Its own function keeps a weight itself for the backward pass; torch's keeps a transposed view of
    it, with which a whole weight would stay in memory after its layer's forward pass.
    """
    before = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = before
