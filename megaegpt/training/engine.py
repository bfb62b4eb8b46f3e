"""DeepSpeed behind one class: processes, precision, the optimizer step, and the state that is saved.

Nothing else in the project imports DeepSpeed, so what it expects is written down here. Tested with
0.19.8; ``setup.py`` pins the line, because defaults move between releases.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaegpt.config.run import RunConfig
from megaegpt.errors import CheckpointError, ConfigError, LaunchError
from megaegpt.parallel.grid import DeepSpeedMpu, ProcessGrid
from megaegpt.parallel.loss import IGNORE
from megaegpt.parallel.params import spec_of
from megaegpt.parallel.rng import seed_micro_step
from megaegpt.training.deepspeed_config import Precision, deepspeed_config
from megaegpt.training.optimizer import build_adamw, build_clipped_adamw
from megaegpt.training.schedule import learning_rate

MicroBatch = Mapping[str, Tensor]
"""Tensors by name, on any device; ``targets`` (-100 where nothing is predicted) must be among them."""

LossFunction = Callable[[Callable[..., Tensor], MicroBatch], Tensor]
"""(model, micro-batch on this device) -> sum of nats, by one call of the model."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def init_distributed() -> torch.device:
    """Join the processes that ``deepspeed`` or ``torchrun`` started, or be the only one; the device to use.

    Call it once, before :meth:`ProcessGrid.create`.

    Raises:
        LaunchError: more processes than GPUs on this machine, or an incomplete environment.
    """


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """``auto`` is bf16 on a GPU and fp32 on a CPU.

    Raises:
        ConfigError: the device cannot compute in ``wanted``.
    """


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Tensors are scalars on the device, equal on all ranks; reading them waits for it."""

    loss: Tensor
    """Mean nats per token over the global batch, before the update."""
    tokens: Tensor
    """Predicted tokens of the global batch."""
    grad_norm: Tensor
    """Global gradient norm before clipping; inf where the step was skipped."""
    lr: float
    """Learning rate of this step."""
    applied: bool
    """False: the gradient was not finite and the weights are unchanged."""
    nonfinite: bool
    """Skipped for a cause that loss scaling does not cure (fp16 skips steps while it finds its scale)."""


class Engine:
    """A model under DeepSpeed: ZeRO, mixed precision, clipping, AdamW.

    Args:
        model: the trainable model, with its initial weights; moved to the device and cast in place.
        grid: this process's place.
        config: the run.
    """

    def __init__(self, model: nn.Module, grid: ProcessGrid, config: RunConfig) -> None:
        self.grid = grid
        self.precision: Precision = "fp32"
        self.model = model

    def train_step(
        self, step: int, micro_batches: Sequence[MicroBatch], loss_function: LossFunction
    ) -> StepResult:
        """Optimizer step ``step`` (counted from 0) over this rank's micro-batches. Collective.

        The gradient is that of (nats of the global batch) / (predicted tokens of the global batch).
        """
        raise NotImplementedError
