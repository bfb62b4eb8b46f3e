"""Nats of every token of a text, by a GPT that reads each chunk by itself, a DeepGPT, or an EGPT
with its own, another window's, or no features.

Shapes: W windows, N chunks, S chunk size, P features a chunk, C hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megaegpt.data.stream import TokenStream
from megaegpt.errors import DataError
from megaegpt.generation.loading import LoadedModel
from megaegpt.model.egpt import EGPT, chunk_features
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT
from megaegpt.parallel.loss import IGNORE

Features = Literal["true", "shuffled", "zero"]


@dataclass(frozen=True)
class Text:
    """A split in non-overlapping windows of chunks; every token but the first is predicted once."""

    tokens: Tensor
    """(W, N, S) int64, 0 behind the end."""
    targets: Tensor
    """(W, N, S), -100 behind the end."""

    @staticmethod
    def read(stream: TokenStream, num_chunks: int, chunk_size: int) -> Text:
        """Cut ``stream``.

        Raises:
            DataError: it has less than two whole windows, so that features cannot be exchanged.
        """
        size, total = num_chunks * chunk_size, len(stream) - 1
        if total < 2 * size:
            raise DataError(
                f"{stream.prefixes[0]} has {total + 1:,} tokens; what is reported needs two "
                f"windows, {2 * size + 1:,}"
            )
        padding = -total % size
        read = torch.from_numpy(stream.read(0, total + 1).astype(np.int64))
        tokens = torch.nn.functional.pad(read[:-1], (0, padding))
        targets = torch.nn.functional.pad(read[1:], (0, padding), value=IGNORE)
        shape = (-1, num_chunks, chunk_size)
        return Text(tokens.view(shape), targets.view(shape))

    def batches(self, size: int) -> Iterator[slice]:
        """Windows, ``size`` at once."""
        return (slice(first, first + size) for first in range(0, len(self.tokens), size))


@torch.no_grad()
def token_nats(
    loaded: LoadedModel, text: Text, batch_size: int, features: Features = "true"
) -> np.ndarray:
    """Nats of each target, (W, N, S) float64; 0 where there is none."""
    model, device = loaded.model, loaded.model.grid.device
    others = None
    if isinstance(model, EGPT) and features == "shuffled":
        others = _others_features(model, loaded.encoder, text, batch_size)
    rows = []
    for windows in text.batches(batch_size):
        tokens, targets = (x[windows].to(device) for x in (text.tokens, text.targets))
        if isinstance(model, GPT):
            nats = model(tokens.flatten(0, 1), targets.flatten(0, 1), reduction="none")
        else:
            arguments = [_states(loaded.encoder, tokens)]
            if isinstance(model, EGPT):
                own = chunk_features(arguments[0][:, :-1], model.config.egpt)
                if features == "zero":
                    own = torch.zeros_like(own)
                arguments.append(own if others is None else others[windows].to(device))
            nats = model(*arguments, targets, reduction="none")
        rows.append(nats.view(targets.shape).double().cpu())
    return torch.cat(rows).numpy()


def _states(encoder: FrozenEncoder | None, tokens: Tensor) -> Tensor:
    assert encoder is not None  # loaded with every model but a GPT
    return encoder(tokens)


def _others_features(
    model: EGPT, encoder: FrozenEncoder | None, text: Text, batch_size: int
) -> Tensor:
    """Features of another window for each window, (W, N - 1, P, C): of the next whole one."""
    whole = int((text.targets != IGNORE).flatten(1).all(1).sum())
    found = [
        chunk_features(_states(encoder, x.to(model.grid.device))[:, :-1], model.config.egpt).cpu()
        for x in text.tokens[:whole].split(batch_size)
    ]
    return torch.cat(found)[(torch.arange(len(text.tokens)) + 1) % whole]


def summarize(nats: np.ndarray, text: Text, byte_lengths: np.ndarray) -> dict[str, Any]:
    """Losses of :func:`token_nats` as plain numbers: in all, by chunk of the window, and by
    position inside the chunk.
    """
    valid = (text.targets != IGNORE).numpy()
    num_bytes = int(byte_lengths[text.targets.clamp(min=0).numpy()][valid].sum())
    return {
        "loss": nats.sum() / valid.sum(),
        "nats_per_byte": nats.sum() / num_bytes,
        "tokens": int(valid.sum()),
        "bytes": num_bytes,
        "by_chunk": (nats.sum((0, 2)) / valid.sum((0, 2))).tolist(),
        "by_position": (nats.sum((0, 1)) / valid.sum((0, 1))).tolist(),
    }
