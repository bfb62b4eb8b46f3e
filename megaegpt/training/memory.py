"""A rank's memory in training, known before anything is allocated.

The forward and backward pass of one micro-batch is played through with torch's fake tensors, which
have shapes and no memory, so activations are those of the real modules under any attention, window,
recomputation and tensor-parallel size. What ZeRO holds beside them follows from DeepSpeed 0.19.8's
optimizers, and is held against measured runs by the tests.

Not counted: the CUDA context and libraries' workspaces, fragmentation, attention dropout's masks.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.model.build import Model, empty_model
from megaegpt.model.deepgpt import DeepGPT
from megaegpt.model.egpt import EGPT, chunk_features
from megaegpt.model.gpt import GPT
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.loss import ROWS_AT_ONCE, linear_cross_entropy
from megaegpt.training.allocations import TensorMeter
from megaegpt.training.deepspeed_config import Precision, deepspeed_config, effective_zero_stage

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REDUCED_AT_ONCE = 500_000_000
"""Gradient elements that DeepSpeed reduces at once without a bucket (stage 0, bf16 stage 1)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a rank at the moment of a step when they are most."""

    weights: int = 0
    """Parameters in the precision of the computation."""
    optimizer: int = 0
    """Adam's moments, and fp32 weights where the computation has others."""
    gradients: int = 0
    """What is kept of them between micro-steps and until the update."""
    buffers: int = 0
    """Gradients in the course of their reduction over data-parallel ranks."""
    encoder: int = 0
    """The frozen encoder's weights."""
    activations: int = 0
    """What a micro-batch keeps for the backward pass, and passing values at the peak."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = {name: size for name, size in dataclasses.asdict(self).items() if size}
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"about {self.total / 2**30:.2f} GiB a rank ({listed})"


def estimate_memory(
    config: RunConfig,
    dp_size: int,
    precision: Precision,
    encoder: ModelConfig | None = None,
    device_type: str = "cuda",
) -> MemoryEstimate:
    """Peak of a rank's tensors over a training step.

    Args:
        config: the run; ``model.encoder.source`` is not read.
        dp_size: data-parallel ranks.
        precision: what ``auto`` has become.
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        device_type: ``cuda`` or ``cpu``, which compute in different portions.
    """
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    several = config.gradient_accumulation(dp_size) > 1
    keeps_gradients = stage < 2 and (precision != "fp32" or not several)
    passed = _play(config, precision, encoder, device_type, keeps_gradients)
    zero = _Zero(config, dp_size, precision, stage, several, passed)
    return max(zero.moments(), key=lambda moment: moment.total)


@dataclass(frozen=True)
class _Pass:
    """Forward and backward of a micro-batch; sizes in bytes beside the weights."""

    parameters: int
    """This rank's, in elements."""
    largest_parameter: int
    encoder: int
    kept: int
    """Between forward and backward."""
    peak: int


@dataclass(frozen=True)
class _Zero:
    """What DeepSpeed's optimizers hold; n: this rank's parameters."""

    config: RunConfig
    dp_size: int
    precision: Precision
    stage: int
    several: bool
    """More than one micro-step, so that gradients exist while activations do."""
    passed: _Pass

    def moments(self) -> list[MemoryEstimate]:
        """The candidates for the peak: in the backward pass, and when gradients are reduced."""
        n = self.passed.parameters
        item = _DTYPES[self.precision].itemsize
        states = 8 * n if self.stage == 0 else 12 * n // self.dp_size
        base = MemoryEstimate(weights=item * n, optimizer=states, encoder=self.passed.encoder)
        if self.stage == 2:
            return self._stage_2(base, n, item)
        if self.precision == "fp32":
            return self._unpartitioned_fp32(base, n)
        gradients, once = 4 * n, min(n, _REDUCED_AT_ONCE)
        return [
            dataclasses.replace(base, gradients=gradients, activations=self.passed.peak),
            # The micro-step's own gradients, a flat fp32 copy, and one in the precision of the wire
            dataclasses.replace(base, gradients=gradients + item * n, buffers=(4 + item) * once),
        ]

    def _unpartitioned_fp32(self, base: MemoryEstimate, n: int) -> list[MemoryEstimate]:
        accumulated = 4 * n if self.several else 0
        if self.stage == 0:
            in_backward, reducing = 0, 4 * min(n, _REDUCED_AT_ONCE)
        else:
            in_backward = 4 * self._bucket(n)
            reducing = in_backward + 8 * self.passed.largest_parameter
        peak = self.passed.peak
        return [
            dataclasses.replace(base, gradients=accumulated, buffers=in_backward, activations=peak),
            dataclasses.replace(base, gradients=4 * n, buffers=reducing),
        ]

    def _stage_2(self, base: MemoryEstimate, n: int, item: int) -> list[MemoryEstimate]:
        part, bucket = 4 * n // self.dp_size, self._bucket(n)
        early = self.several or bucket < n  # reduced gradients exist before the pass has ended
        buckets = item * bucket * (2 if self.config.parallel.overlap_comm else 1)
        flat = item * bucket + (4 * self.passed.largest_parameter if item < 4 else 0)
        left = int(self.passed.kept * (1 - bucket / n))  # when the first full bucket is reduced
        return [
            dataclasses.replace(
                base,
                gradients=part if early else 0,
                buffers=buckets,
                activations=self.passed.peak,
            ),
            dataclasses.replace(base, gradients=part, buffers=buckets + flat, activations=left),
        ]

    def _bucket(self, n: int) -> int:
        options = deepspeed_config(self.config, self.dp_size, self.precision, n)
        return min(n, int(options["zero_optimization"]["reduce_bucket_size"]))


# -- the pass with fake tensors -------------------------------------------------------------------


def _play(
    config: RunConfig,
    precision: Precision,
    encoder: ModelConfig | None,
    device_type: str,
    keeps_gradients: bool,
) -> _Pass:
    """Forward and backward by the CPU's operators; fused attention keeps what a GPU's does."""
    grid = ProcessGrid(tp_size=config.parallel.tensor_parallel_size)
    with FakeTensorMode(), TensorMeter() as meter, _default_dtype(_DTYPES[precision]):
        model = _fake(config.model, grid, device_type)
        model.stack.recompute = config.training.activation_checkpointing
        frozen = None if encoder is None else _fake(encoder, grid, device_type)
        encoder_bytes = 0 if frozen is None else _parameter_bytes(frozen)
        gc.collect()
        before = meter.live
        hidden, targets = _hidden_states(model, frozen, config)
        rows = ROWS_AT_ONCE.get(device_type)
        nats = linear_cross_entropy(
            hidden, model.head.weight, targets, grid, config.model.vocab_size, rows=rows
        )
        del hidden
        kept = meter.live - before
        if not keeps_gradients:
            _drop_gradients(model)
        nats.backward()
        peak = meter.peak - before
    sizes = [p.numel() for p in model.parameters()]
    return _Pass(sum(sizes), max(sizes), encoder_bytes, kept, peak)


def _fake(config: ModelConfig, grid: ProcessGrid, device_type: str) -> Model:
    model = empty_model(config, grid)
    if device_type != "cpu":  # fused attention on a GPU drops without a mask; a CPU's cannot
        for block in model.stack.blocks:
            setattr(block.attention, "dropout", 0.0)  # noqa: B010
    return model


def _hidden_states(model: Model, encoder: Model | None, config: RunConfig) -> tuple[Tensor, Tensor]:
    """What the head reads of a micro-batch, and its targets; the encoder runs before."""
    rows, egpt = config.training.micro_batch_size, config.model.egpt
    if isinstance(model, GPT):
        tokens = torch.zeros(rows, config.model.max_seq_len, dtype=torch.int64)
        return model.hidden_states(tokens), tokens
    shape = (rows, egpt.num_chunks, egpt.chunk_size)
    tokens = torch.zeros(shape, dtype=torch.int64)
    if isinstance(encoder, GPT) and config.data.token_features == "online":
        with torch.no_grad():
            states = encoder.hidden_states(tokens.flatten(0, 1)).view(*shape, -1)
    else:
        states = torch.zeros(*shape, config.model.hidden_size)
    if isinstance(model, DeepGPT):
        return model.hidden_states(states), tokens
    assert isinstance(model, EGPT)
    return model.hidden_states(states, chunk_features(states[:, :-1], egpt)), tokens


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _drop_gradients(model: nn.Module) -> None:
    """Let go of each gradient when it is complete, as ZeRO does when it has copied it."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(drop)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point tensors without a type of their own are made in ``dtype``."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
