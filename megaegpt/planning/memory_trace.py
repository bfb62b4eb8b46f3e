"""One micro-step of a rank, traced with torch's fake tensors, which have shapes and no memory.

So what it holds and sends is known before anything is allocated or any other process exists, from
the real modules under any attention, window, recomputation and tensor-parallel size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.data.tokens.batch import Batch
from megaegpt.model.adapters import choose_trained
from megaegpt.model.build import Model, build_inputs, empty_model
from megaegpt.model.calling import ModelInputs
from megaegpt.model.gpt import GPT
from megaegpt.model.parts import matrices_of
from megaegpt.parallel.chunks import ChunkShares
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.loss import LOGITS_AT_ONCE, ROWS_AT_ONCE, fused_rows
from megaegpt.planning.allocations import TensorMeter
from megaegpt.precision import DTYPES, Precision

_LARGE_GPU = 16 * LOGITS_AT_ONCE
"""Bytes of a GPU whose head computes as many rows at once as any; smaller ones need less."""


@dataclass(frozen=True)
class MicroStep:
    """Forward and backward of a micro-batch; sizes in bytes beside the weights."""

    parameters: int
    """This rank's trainable ones, in elements."""
    largest_parameter: int
    muon: tuple[int, ...]
    """Of those, the elements of each matrix that Muon would step."""
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


class _CountingGroup(dist.ProcessGroup):
    """A group of several ranks for this process alone, which notes what would be sent."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]
        self.summed = self.cut = 0

    def allreduce(  # type: ignore[override]
        self, tensors: list[Tensor], options: object = None
    ) -> None:
        """Note the bytes of an all-reduce; ``torch.distributed.all_reduce`` calls it."""
        self.summed += sum(tensor.nbytes for tensor in tensors)

    def all_gather_single(  # type: ignore[override]
        self, output: Tensor, part: Tensor, options: object = None
    ) -> None:
        """Note the bytes of what is gathered."""
        self.cut += output.nbytes

    def reduce_scatter_single(  # type: ignore[override]
        self, part: Tensor, source: Tensor, options: object = None
    ) -> None:
        """Note the bytes of what is summed and scattered."""
        self.cut += source.nbytes

    def all_to_all_single(  # type: ignore[override]
        self, output: Tensor, source: Tensor, *sizes_and_options: object
    ) -> None:
        """Note the bytes of what is exchanged."""
        self.cut += source.nbytes

    # Their names before torch 2.13.
    alltoall_base = all_to_all_single  # type: ignore[assignment]
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]


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
    """
    tp_size, cp_size = config.parallel.tensor_parallel_size, config.parallel.context_parallel_size
    group, context = _CountingGroup(tp_size), _CountingGroup(cp_size)
    grid = ProcessGrid(
        tp_size=tp_size,
        tp_group=group if tp_size > 1 else None,
        cp_size=cp_size,
        cp_group=context if cp_size > 1 else None,
    )
    with _faked(DTYPES[precision]), TensorMeter() as meter:
        model = _fake(config.model, grid, device_type)
        choose_trained(model, config.training)
        model.stack.recompute = config.training.activation_checkpointing
        model.stack.sequence_parallel = config.parallel.sequence_parallel
        has_kernels = device_type == "cuda" and precision != "fp32"
        model.stack.fused = has_kernels if fused_blocks is None else fused_blocks
        frozen = None if encoder is None else _fake(encoder, grid, device_type)
        if frozen is not None:
            frozen.requires_grad_(False)
            frozen.stack.sequence_parallel = config.parallel.sequence_parallel
        gc.collect()
        before = meter.live
        fused = device_type == "cuda" if fused_head is None else fused_head
        rows = ROWS_AT_ONCE.get(device_type)
        if fused:
            columns = config.model.padded_vocab_size // tp_size
            rows = fused_rows(columns, DTYPES[precision], _LARGE_GPU)
        model.head.loss_options = dataclasses.replace(
            model.head.loss_options, rows=rows, fused=fused
        )
        inputs = build_inputs(
            config.model,
            functools.partial(_encode, frozen, config.model),
            DTYPES[precision],
            shares=ChunkShares(grid) if cp_size > 1 and config.model.needs_encoder else None,
        )
        if not keeps_gradients:
            _drop_gradients(model)
        with observed_by or contextlib.nullcontext():
            batch = _batch(config, inputs, sample_tokens or config.model.sample_len)
            loss = inputs.loss(model, batch)
            kept = meter.live - before
            loss.backward()
        peak = meter.peak - before
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen_bytes = _frozen_bytes(model) + (0 if frozen is None else _frozen_bytes(frozen))
    muon = tuple(matrix.numel() for matrix in matrices_of(model).values())
    return MicroStep(
        parameters=sum(sizes),
        largest_parameter=max(sizes),
        muon=muon,
        frozen=frozen_bytes,
        frozen_parts=_frozen_bytes(model),
        kept=kept,
        peak=peak,
        summed=group.summed,
        cut=group.cut,
        shared=context.cut,
    )


def _fake(config: ModelConfig, grid: ProcessGrid, device_type: str) -> Model:
    model = empty_model(config, grid)
    if device_type != "cpu":  # fused attention on a GPU drops without a mask; a CPU's cannot
        for block in model.stack.blocks:
            cast(nn.Module, block.attention).eval()
    return model


def _batch(config: RunConfig, inputs: ModelInputs, sample_tokens: int) -> Batch:
    """A micro-batch as it is on the device; states of the encoder are in it if they are stored."""
    model = config.model
    tokens = torch.zeros(config.training.micro_batch_size, sample_tokens, dtype=torch.int64)
    batch = inputs.prepare({"tokens": tokens, "targets": tokens})
    if model.needs_encoder and config.data.token_features == "stored":
        states = torch.zeros(*batch["tokens"].shape, model.hidden_size)
        return {**batch, "token_states": states}
    return batch


@torch.no_grad()
def _encode(
    encoder: Model | None, decoder: ModelConfig, tokens: Tensor, before: Tensor | None = None
) -> Tensor:
    """Tokens (B, N, S) behind those before (B, N, O) -> states (B, N, S, C); zeros where no encoder
    is known.
    """
    if encoder is None:
        return torch.zeros(*tokens.shape, decoder.hidden_size)
    rows = tokens if before is None else torch.cat([before, tokens], dim=-1)
    states = cast(GPT, encoder).hidden_states(rows.flatten(0, 1))
    return states[:, -tokens.shape[-1] :].unflatten(0, tokens.shape[:2])


def _frozen_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


def _drop_gradients(model: nn.Module) -> None:
    """Let go of each gradient when it is complete, as ZeRO does when it has copied it."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(drop)


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
