"""One rank of a run by itself: its model fed with a micro-batch, its collectives sending nothing.

What it holds can so be found before any other rank is there, with fake tensors or on a device.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.data.features.store import PREDICTIONS
from megaegpt.data.tokens.batch import Batch
from megaegpt.model.adapters import choose_trained
from megaegpt.model.build import Model, build_inputs, empty_model
from megaegpt.model.calling import ModelInputs
from megaegpt.model.gpt import GPT
from megaegpt.parallel.chunks import ChunkShares
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.precision import DTYPES, Precision


class CountingGroup(dist.ProcessGroup):
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


class LoneRank:
    """Its tensors are made on the default device and, where they are floating-point, in the default
    type; weights have no values yet.

    Args:
        config: the run; ``model.encoder.source`` is not read.
        precision: what ``auto`` has become.
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
        grid: its place, whose groups are called; None: the first, whose bytes are counted.
    """

    def __init__(
        self,
        config: RunConfig,
        precision: Precision,
        encoder: ModelConfig | None,
        grid: ProcessGrid | None = None,
    ) -> None:
        parallel = config.parallel
        tp_size, cp_size = parallel.tensor_parallel_size, parallel.context_parallel_size
        self._config = config
        self.group, self.context_group = CountingGroup(tp_size), CountingGroup(cp_size)
        grid = grid or ProcessGrid(
            tp_size=tp_size,
            tp_group=self.group if tp_size > 1 else None,
            cp_size=cp_size,
            cp_group=self.context_group if cp_size > 1 else None,
        )
        self.model: Model = empty_model(config.model, grid)
        choose_trained(self.model, config.training)
        self.model.stack.recompute = config.training.activation_checkpointing
        self.frozen: Model | None = None
        if encoder is not None:
            self.frozen = empty_model(encoder, grid)
            self.frozen.requires_grad_(False)
        for model in self.models:
            model.stack.sequence_parallel = config.parallel.sequence_parallel
        encode = functools.partial(_encode, self.frozen, config.model)
        shares = ChunkShares(grid) if cp_size > 1 and config.model.needs_encoder else None
        self._inputs = build_inputs(config.model, encode, DTYPES[precision], shares=shares)

    @property
    def models(self) -> list[Model]:
        """The trained one and its encoder, if there is one."""
        return [model for model in (self.model, self.frozen) if model is not None]

    def loss(self, sample_tokens: int | None = None) -> Tensor:
        """The forward pass of a micro-batch.

        Args:
            sample_tokens: its columns; None: as many as the model's samples have.
        """
        columns = sample_tokens or self._config.model.sample_len
        batch = _batch(self._config, self._inputs, columns)
        return self._inputs.loss(self.model, batch)

    def drop_gradients(self) -> None:
        """Let go of each gradient when it is complete, as ZeRO does when it has copied it."""

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        for parameter in (p for p in self.model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(drop)


def _batch(config: RunConfig, inputs: ModelInputs, sample_tokens: int) -> Batch:
    """A micro-batch as it is on the device, with what is stored of it."""
    model, rows = config.model, config.training.chosen_micro_batch_size
    tokens = torch.zeros(rows, sample_tokens, dtype=torch.int64)
    batch = inputs.prepare({"tokens": tokens, "targets": tokens})
    if model.needs_encoder and config.data.token_features == "stored":
        states = torch.zeros(*batch["tokens"].shape, model.hidden_size)
        batch = {**batch, "token_states": states}
    if config.data.predictions == "stored":
        known = (batch["token_states"], torch.zeros(batch["tokens"].shape))
        batch = {**batch, **dict(zip(PREDICTIONS, known, strict=True))}
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
    # Nothing is before a text's first chunk: its id -1 is none that a model knows.
    rows = tokens if before is None else torch.cat([before.clamp(min=0), tokens], dim=-1)
    states = cast(GPT, encoder).hidden_states(rows.flatten(0, 1))
    return states[:, -tokens.shape[-1] :].unflatten(0, tokens.shape[:2])
