"""One micro-step of a rank, traced with torch's fake tensors, which have shapes and no memory.

So what it holds and sends is known before anything is allocated or any other process exists, from
the real modules under any attention, window, recomputation and tensor-parallel size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.model.egpt.copy_attention import SCORES_AT_ONCE
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.parts import matrices_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.loss import LOGITS_AT_ONCE, ROWS_AT_ONCE, fused_rows
from megaegpt.planning.allocations import TensorMeter
from megaegpt.planning.lone_rank import LoneRank
from megaegpt.planning.muon_share import Matrix
from megaegpt.precision import DTYPES, Precision

_LARGE_GPU = 16 * LOGITS_AT_ONCE
"""Bytes of a GPU whose head computes as many rows at once as any; smaller ones need less."""


@dataclass(frozen=True)
class MicroStep:
    """Forward and backward of a micro-batch; sizes in bytes beside the weights."""

    parameters: int
    """This rank's trainable ones, in elements."""
    largest_parameter: int
    muon: tuple[Matrix, ...]
    """Those that Muon would step."""
    frozen: int
    """Weights of the encoder and of frozen parts."""
    frozen_parts: int
    """Of those, the model's own, which ZeRO stage 3 cuts as well."""
    kept: int
    """Between forward and backward."""
    peak: int
    summed: int
    """Bytes that are all-reduced over the tensor-parallel ranks."""
    cut: int
    """Bytes of the tensors that sequence parallelism gathers from them or scatters over them."""
    shared: int
    """Bytes of the tensors that are gathered from the context-parallel ranks, scattered over them
    or exchanged with them."""


def trace_micro_step(
    config: RunConfig,
    precision: Precision,
    encoder: ModelConfig | None,
    device_type: str,
    keeps_gradients: bool,
    observed_by: AbstractContextManager[object] | None = None,
    fused_head: bool | None = None,
    sample_tokens: int | None = None,
    fused_blocks: bool | None = None,
    grid: ProcessGrid | None = None,
) -> MicroStep:
    """Forward and backward by the CPU's operators; fused attention keeps what a GPU's does.

    Args:
        config: the run; ``model.encoder.source`` is not read.
        precision: what ``auto`` has become.
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        device_type: ``cuda`` or ``cpu``, which compute in different portions.
        keeps_gradients: whether gradients stay with the parameters during the backward pass.
        observed_by: is active during the forward and the backward pass.
        fused_head: see ``LossOptions.fused``; None: as the device has it.
        sample_tokens: columns of the micro-batch; None: as long as the model's samples are.
        fused_blocks: see ``BlockStack.fused``; None: as the device has it.
        grid: a rank's place, whose groups are called; None: the first's, whose bytes are counted.
    """
    with _faked(DTYPES[precision]), TensorMeter() as meter:
        rank = LoneRank(config, precision, encoder, grid)
        model = rank.model
        _compute_as_on(device_type, rank)
        has_kernels = device_type == "cuda" and precision != "fp32"
        model.stack.fused = has_kernels if fused_blocks is None else fused_blocks
        gc.collect()
        before = meter.live
        fused = device_type == "cuda" if fused_head is None else fused_head
        rows = ROWS_AT_ONCE.get(device_type)
        if fused:
            columns = config.model.padded_vocab_size // config.parallel.tensor_parallel_size
            rows = fused_rows(columns, DTYPES[precision], _LARGE_GPU)
        model.head.loss_options = dataclasses.replace(
            model.head.loss_options, rows=rows, fused=fused
        )
        if not keeps_gradients:
            rank.drop_gradients()
        with observed_by or contextlib.nullcontext():
            loss = rank.loss(sample_tokens)
            kept = meter.live - before
            loss.backward()
        peak = meter.peak - before
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen_bytes = sum(map(_frozen_bytes, rank.models))
    muon = tuple(map(Matrix.of, matrices_of(model).values()))
    return MicroStep(
        parameters=sum(sizes),
        largest_parameter=max(sizes),
        muon=muon,
        frozen=frozen_bytes,
        frozen_parts=_frozen_bytes(model),
        kept=kept,
        peak=peak,
        summed=rank.group.summed,
        cut=rank.group.cut,
        shared=rank.context_group.cut,
    )


def _compute_as_on(device_type: str, rank: LoneRank) -> None:
    """Fused attention on a GPU drops without a mask, a CPU's cannot; and a token memory computes so
    many scores at once as the device has room for.
    """
    if isinstance(rank.model, EGPT) and rank.model.token_memory is not None:
        rank.model.token_memory.scores_at_once = SCORES_AT_ONCE.get(device_type)
    if device_type != "cpu":
        for model in rank.models:
            for block in model.stack.blocks:
                cast(nn.Module, block.attention).eval()


def _frozen_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


@contextmanager
def _faked(dtype: torch.dtype) -> Iterator[None]:
    """Tensors have no memory; floating-point ones without a type of their own are ``dtype``."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(previous)
