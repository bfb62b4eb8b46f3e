"""From hidden states to the vocabulary: sharded logits, or the loss without them.

Shapes: C hidden, V padded vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.parallel.collectives import gather_from_tp
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.int8_weights import Int8Weight
from megaegpt.parallel.loss import (
    LossOptions,
    linear_cross_entropy,
    power_of_two,
    with_all_ranks,
)
from megaegpt.parallel.matmul import linear
from megaegpt.parallel.params import new_parameter


class OutputHead(nn.Module):
    """The vocabulary-parallel head. With ``tied_to`` it shares that (V/tp, C) weight."""

    packed: Tensor | Int8Weight | None = None
    """The weight in ``parallel.matmul.packed_order``, once more, or in int8 in its place; for
    inference."""
    blas_rows: frozenset[int] = frozenset()
    """See :func:`~megaegpt.parallel.matmul.linear`; for inference."""

    def __init__(
        self, config: ModelConfig, grid: ProcessGrid, tied_to: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.vocab_size = config.vocab_size
        self.loss_options = LossOptions(softcap=config.logit_softcap, z_loss=config.z_loss)
        self.weight = tied_to if tied_to is not None else _untied_weight(config, grid)

    def expect_backward_scale(self, scale: Tensor) -> None:
        """Say what following losses will be multiplied by for their backward pass, a positive fp32
        scalar on their device (see :class:`~megaegpt.parallel.loss.LossOptions`).
        """
        self.loss_options = replace(self.loss_options, backward_scale=power_of_two(scale))

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        mixed_with: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden (..., C), targets (...) -> nats; see ``linear_cross_entropy``."""
        return self(hidden, targets, reduction, mixed_with)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V/tp), this rank's columns; padding columns are -inf. No gradient of
        TP.
        """
        return self(hidden)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
        mixed_with: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss, or without targets the logits: all that uses the weight is a call of the
        module, around which ZeRO stage 3 gathers it.
        """
        if targets is None:
            return self._logits(hidden)
        if self.grid.tp_group is not None:  # once; a single process may move its model
            self.loss_options = with_all_ranks(self.loss_options, hidden.device, self.grid)
        weight: Tensor = self.weight
        if isinstance(self.packed, Int8Weight):
            weight = self.packed.whole(hidden.dtype)
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            self.grid,
            self.vocab_size,
            reduction,
            self.loss_options,
            mixed_with,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.weight, packed=self.packed, blas_rows=self.blas_rows)
        if (softcap := self.loss_options.softcap) is not None:
            logits = softcap * torch.tanh(logits / softcap)
        first = self.grid.tp_rank * logits.shape[-1]
        real = min(max(self.vocab_size - first, 0), logits.shape[-1])
        if torch.is_grad_enabled():
            return F.pad(logits[..., :real], (0, logits.shape[-1] - real), value=-torch.inf)
        logits[..., real:] = -torch.inf  # in place: a copy takes a hundredth of a decoding step
        return logits

    def full_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., vocab_size) on every TP rank, for sampling."""
        return gather_from_tp(self.logits(hidden), self.grid)[..., : self.vocab_size]


def _untied_weight(config: ModelConfig, grid: ProcessGrid) -> nn.Parameter:
    return new_parameter(
        (config.padded_vocab_size, config.hidden_size),
        grid,
        tp_dim=0,
        std=config.init_std,
        vocab_rows=config.vocab_size,
    )
