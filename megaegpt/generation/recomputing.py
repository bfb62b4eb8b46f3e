"""Decoding without a cache: the same function written naively, which tests hold the others against.

Shapes: B rows, T tokens, S chunk size, N chunks, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.model.build import Model, build_inputs
from megaegpt.model.decoding import context_start
from megaegpt.model.encoder import FrozenEncoder


class RecomputingDecoder:
    """Every token runs the model over all that it sees, in the form used in training."""

    def __init__(self, model: Model, encoder: FrozenEncoder | None) -> None:
        self._model = model
        self._inputs = build_inputs(model.config, encoder, model.head.weight.dtype)
        self._tokens: Tensor | None = None

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """(B, T) ids that follow those so far -> (B, V) logits of the next."""
        if self._tokens is not None:
            tokens = torch.cat([self._tokens, tokens], dim=1)
        self._tokens = tokens
        seen, last = self._seen(tokens)
        batch = {"tokens": seen, "targets": seen}
        preceding, begin = self._model.config.preceding_tokens, tokens.shape[1] - last - 1
        if 0 < preceding <= begin:
            batch["before"] = tokens[:, begin - preceding : begin]
        batch = dict(self._inputs.prepare(batch))
        predictions = self._model.predictions(**self._inputs.arguments(batch))
        places = torch.arange(seen.shape[1], device=seen.device) == last
        chosen = places.expand(seen.shape).reshape(batch["tokens"].shape)
        return torch.cat(list(predictions.logits(chosen)))

    def _seen(self, tokens: Tensor) -> tuple[Tensor, int]:
        """Tokens that the model is called on, (B, T), and the index of the newest one in them. The
        last chunk is padded with tokens that causality hides.
        """
        config, length = self._model.config, tokens.shape[1]
        if not config.needs_encoder:
            seen = tokens[:, context_start(length, config.max_seq_len) :]
            return seen, seen.shape[1] - 1
        missing = -length % config.length_multiple
        window = F.pad(tokens, (0, missing))[:, -config.sample_len :]
        return window, window.shape[1] - missing - 1
