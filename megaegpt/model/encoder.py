"""The frozen GPT under EGPT and DeepGPT.

It is never part of the trained module: the DeepSpeed engine, the optimizer and the checkpoints do
not know it. It is built from its own source each time, and its fingerprint is what a run remembers
of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megaegpt.config import EncoderConfig, ModelConfig
from megaegpt.config.arithmetic import arithmetic_differences, model_arithmetic
from megaegpt.config.validation import validate_model
from megaegpt.errors import ConfigError
from megaegpt.labels import NOTHING_BEFORE
from megaegpt.model.base import LanguageModel
from megaegpt.model.block import BlockStack
from megaegpt.model.flops import attention_flops, matmul_flops
from megaegpt.model.gpt import GPT
from megaegpt.model.weights import load_weights, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import full_state


class FrozenEncoder(nn.Module):
    """A GPT without gradients, always in eval mode."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt.requires_grad_(False).eval()
        self.config = gpt.config
        self.fingerprint = weights_fingerprint(gpt)

    @staticmethod
    def from_source(
        config: EncoderConfig, grid: ProcessGrid, dtype: torch.dtype = torch.float32
    ) -> FrozenEncoder:
        """Load the GPT that ``config.source`` names, cut for ``grid``, on its device, in ``dtype``.

        Raises:
            ConfigError: no source, or it is not a GPT, or none that ``grid`` can cut.
            CheckpointError: the folder is missing or damaged.
        """
        if config.source is None:
            raise ConfigError("model.encoder.source is not set: give the folder of a GPT's weights")
        model_config, _ = read_weights_config(config.source)
        if model_config.kind != "gpt":
            raise ConfigError(
                f"model.encoder.source={config.source} is of kind {model_config.kind}; "
                "an encoder must be a gpt"
            )
        validate_model(model_config, config.source, grid.tp_size)
        gpt = GPT(model_config, grid)
        load_weights(gpt, config.source, grid)
        if config.layers is not None:
            _cut(gpt, config.layers)
        encoder = FrozenEncoder(gpt)  # the fingerprint is of the weights as stored, before casts
        return encoder.to(device=grid.device, dtype=dtype)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def description(self) -> dict[str, Any]:
        """Return what a decoder's weights record of it, for :meth:`difference`: JSON values."""
        return {
            "encoder_fingerprint": self.fingerprint,
            "encoder_arithmetic": model_arithmetic(self.config),
        }

    def difference(self, kept: Mapping[str, Any]) -> str | None:
        """In what it is another encoder than the one of which a description was kept; None: in
        nothing. Earlier versions kept no arithmetic.
        """
        fingerprint, arithmetic = kept.get("encoder_fingerprint"), kept.get("encoder_arithmetic")
        if fingerprint != self.fingerprint:
            return f"its fingerprint is {self.fingerprint[:16]}, not {str(fingerprint)[:16]}"
        if not isinstance(arithmetic, dict):
            return None
        found = arithmetic_differences(arithmetic, model_arithmetic(self.config))
        differences = [
            f"{k} is {there} there and {here} here" for k, (there, here) in found.items()
        ]
        return f"its weights are the same, but {'; '.join(differences)}" if differences else None

    @torch.no_grad()
    def forward(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """Chunks' states after the final norm, or of the last block where the encoder is cut.

        Args:
            tokens: (..., S) ids.
            before: (..., O) ids of the tokens before each chunk, which it sees; -1 where its text
                begins. S + O is at most ``max_seq_len``.

        Returns:
            (..., S, C)
        """
        rows = tokens.reshape(-1, tokens.shape[-1])
        if before is None:
            return self.gpt.hidden_states(rows).view(*tokens.shape, -1)
        size, overlap = tokens.shape[-1], before.shape[-1]
        before = before.reshape(-1, overlap)
        # A chunk that nothing precedes is put first: what is behind it, causality hides.
        first = before[:, :1] == NOTHING_BEFORE  # (n, 1)
        before = before.clamp(min=0)
        alone, behind = torch.cat([rows, before], dim=1), torch.cat([before, rows], dim=1)
        states = self.gpt.hidden_states(torch.where(first, alone, behind))  # (n, O + S, C)
        states = torch.where(first.unsqueeze(-1), states[:, :size], states[:, overlap:])
        return states.view(*tokens.shape, -1)


def encoding_flops(encoder: ModelConfig, length: int, overlap: int = 0) -> int:
    """Operations of encoding one token of a chunk of ``length`` tokens behind an overlap."""
    with torch.device("meta"):
        stack = BlockStack(encoder, ProcessGrid())
    seen = length + overlap
    per_position = matmul_flops(stack) + attention_flops(encoder, seen)
    return per_position * seen // length


def _cut(gpt: GPT, layers: int) -> None:
    """Keep the first blocks, and no final norm behind them.

    Raises:
        ConfigError: there are not so many.
    """
    total = gpt.config.num_layers
    if layers > total:
        raise ConfigError(f"model.encoder.layers={layers}: the encoder has {total} blocks")
    gpt.config = replace(gpt.config, num_layers=layers)
    gpt.stack.blocks = gpt.stack.blocks[:layers]
    gpt.stack.norm = None


def weights_fingerprint(
    model: LanguageModel, without: tuple[str, ...] = (), dtype: torch.dtype | None = None
) -> str:
    """sha256 over names, shapes, types and bytes of the full weights, or of what they are in
    ``dtype``, but for those whose names begin with one of ``without``: the same at any TP size.
    Collective over the TP group.
    """
    digest = hashlib.sha256()
    for name, tensor in full_state(model, model.grid):
        if name.startswith(without):
            continue
        data = tensor.cpu().to(dtype or tensor.dtype).contiguous()
        digest.update(f"{name}:{tuple(data.shape)}:{data.dtype}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
