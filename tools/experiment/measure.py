"""Nats of every token of a text, by a GPT that reads each chunk by itself, a DeepGPT, or an EGPT
with its own, another window's, or no features.

Shapes: W windows, N chunks, S chunk size.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from megaegpt.data.features.store import FeatureStore
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.windows import EvaluationWindows, TokenSource
from megaegpt.errors import DataError
from megaegpt.evaluation.carried_memory import CarriedMemory
from megaegpt.evaluation.history import ShuffledHistory, ZeroHistory
from megaegpt.generation.trained import LoadedModel
from megaegpt.labels import IGNORE
from megaegpt.model.build import build_inputs
from megaegpt.model.calling import ModelInputs, SequenceInputs
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.held_tokens import MemoryLimits


class Stores(NamedTuple):
    """What is stored of a text; None: it is computed."""

    token_states: FeatureStore | None = None
    predictions: FeatureStore | None = None


NOTHING_STORED = Stores()


class Text:
    """A split in non-overlapping windows of chunks; every token but the first is predicted once.

    Args:
        source: its tokens.
        num_chunks: of a window.
        chunk_size: tokens of a chunk.
        before: tokens before a window that the model is told of.

    Raises:
        DataError: it has less than two whole windows, so that features cannot be exchanged.
    """

    def __init__(
        self, source: TokenSource, num_chunks: int, chunk_size: int, before: int = 0
    ) -> None:
        size = num_chunks * chunk_size
        if len(source) <= 2 * size:
            raise DataError(
                f"{len(source):,} tokens are left to report, but exchanging features needs two "
                f"windows of {size:,} and a token: give more text, or select on less"
            )
        self.source = source
        self.num_chunks, self.chunk_size = num_chunks, chunk_size
        self.windows = EvaluationWindows(source, size, num_chunks, overlap=before)

    @cached_property
    def targets(self) -> np.ndarray:
        """(W, N, S) int64, -100 behind the end."""
        targets = self.windows.batch(np.arange(len(self.windows)))["targets"]
        return targets.reshape(-1, self.num_chunks, self.chunk_size)


class ChunksApart(SequenceInputs):
    """GPT: every chunk of a window is a sequence of its own."""

    def __init__(self, chunk_size: int) -> None:
        self._chunk_size = chunk_size

    def prepare(self, batch: Batch) -> Batch:
        """(B, N * S) each -> (B * N, S)."""
        return {name: batch[name].reshape(-1, self._chunk_size) for name in ("tokens", "targets")}


def token_nats(
    loaded: LoadedModel,
    text: Text,
    batch_size: int,
    dtype: torch.dtype,
    features: str = "true",
    stores: Stores = NOTHING_STORED,
) -> np.ndarray:
    """Nats of each target, (W, N, S) float64; 0 where there is none.

    Args:
        loaded: a model in eval mode.
        text: what it reads.
        batch_size: windows at once.
        dtype: the model computes in it.
        features: of an EGPT: one of ``megaegpt.evaluation.history.HISTORIES``.
        stores: of the text.
    """
    return _nats(loaded, text, _inputs(loaded, text, dtype, features, stores), batch_size)


def _nats(loaded: LoadedModel, text: Text, inputs: ModelInputs, batch_size: int) -> np.ndarray:
    """Feed the text's windows in order."""
    device, rows = loaded.model.grid.device, []
    for first in range(0, len(text.windows), batch_size):
        numbers = np.arange(first, min(first + batch_size, len(text.windows)))
        windows = text.windows.batch(numbers)
        batch = inputs.prepare({name: torch.from_numpy(x) for name, x in windows.items()})
        with torch.no_grad():
            on_device = {name: x.to(device) for name, x in batch.items()}
            nats = inputs.loss(loaded.model, on_device, "none")
        rows.append(nats.double().cpu().reshape(-1, text.num_chunks, text.chunk_size))
    return torch.cat(rows).numpy()


def nats_with_memory(
    loaded: LoadedModel,
    text: Text,
    dtype: torch.dtype,
    limits: MemoryLimits,
    stores: Stores = NOTHING_STORED,
) -> np.ndarray:
    """Nats of each target, (W, N, S) float64, of an EGPT whose token memory goes on over the whole
    text.
    """
    assert isinstance(loaded.model, EGPT)
    assert loaded.encoder is not None
    inputs = CarriedMemory(loaded.model, loaded.encoder, dtype, limits, *stores)
    return _nats(loaded, text, inputs, 1)


def _inputs(
    loaded: LoadedModel, text: Text, dtype: torch.dtype, features: str, stores: Stores
) -> ModelInputs:
    if loaded.encoder is None:
        return ChunksApart(text.chunk_size)
    if features == "shuffled":
        return ShuffledHistory(loaded, dtype, text.source, *stores)
    kept = stores._asdict()
    if features == "zero":
        return ZeroHistory(loaded.model.config, loaded.encoder, dtype, **kept)
    return build_inputs(loaded.model.config, loaded.encoder, dtype, **kept)


def summarize(nats: np.ndarray, text: Text, byte_lengths: np.ndarray) -> dict[str, Any]:
    """Losses of :func:`token_nats` as plain numbers: in all, by window, by chunk of the window, and
    by position inside the chunk.
    """
    valid = text.targets != IGNORE
    num_bytes = int(byte_lengths[text.targets[valid]].sum())
    return {
        "loss": nats.sum() / valid.sum(),
        "nats_per_byte": nats.sum() / num_bytes,
        "tokens": int(valid.sum()),
        "bytes": num_bytes,
        "by_window": (nats.sum((1, 2)) / valid.sum((1, 2))).tolist(),
        "by_chunk": (nats.sum((0, 2)) / valid.sum((0, 2))).tolist(),
        "by_position": (nats.sum((0, 1)) / valid.sum((0, 1))).tolist(),
    }
