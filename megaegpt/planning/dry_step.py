"""A micro-step on a GPU before there is a run: how much memory its allocator takes for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.planning.lone_rank import LoneRank
from megaegpt.planning.memory import keeps_gradients
from megaegpt.precision import DTYPES, Precision


def dry_step(
    config: RunConfig,
    dp_size: int,
    precision: Precision,
    encoder: ModelConfig | None,
    device: torch.device,
    beside: int,
    sample_tokens: int | None = None,
) -> int:
    """Compute a forward and a backward pass on a CUDA device, beside as many bytes as optimizer,
    gradients and buffers will take, and free everything again. Other ranks are not needed.

    Args:
        config: the run, its micro-batch a number; ``model.encoder.source`` is not read.
        dp_size: data-parallel ranks.
        precision: what ``auto`` has become.
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        device: on which the step is made.
        beside: those bytes.
        sample_tokens: columns of the micro-batch; None: as long as the model's samples are.

    Returns:
        Bytes that the allocator took from the device at most, the holes between tensors included.

    Raises:
        torch.OutOfMemoryError: there are too few.
    """
    _free_cache(device)
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _step(config, dp_size, precision, encoder, device, beside, sample_tokens)
        return torch.cuda.max_memory_reserved(device) - before
    finally:
        _free_cache(device)


def _step(
    config: RunConfig,
    dp_size: int,
    precision: Precision,
    encoder: ModelConfig | None,
    device: torch.device,
    beside: int,
    sample_tokens: int | None,
) -> None:
    with _made_on(device, DTYPES[precision]):
        held = torch.empty(beside, dtype=torch.uint8)
        rank = LoneRank(config, precision, encoder)
        with torch.no_grad():
            for model in rank.models:
                for parameter in model.parameters():
                    parameter.fill_(0.01)  # whatever lay in memory might be no number
        if not keeps_gradients(config, dp_size, precision):
            rank.drop_gradients()
        rank.loss(sample_tokens).backward()
        del held


def _free_cache(device: torch.device) -> None:
    gc.collect()
    with torch.cuda.device(device):
        torch.cuda.empty_cache()


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Tensors without a place and a type of their own have these."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(previous)
