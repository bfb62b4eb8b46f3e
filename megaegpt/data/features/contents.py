"""What is stored of chunks: the frozen encoder's states, or what a frozen decoder predicts of them.

Shapes: n chunks, S tokens of a chunk, O of the encoder's overlap, C hidden size.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from megaegpt.data.features.store import PREDICTIONS, FeatureSpec, FeatureStore
from megaegpt.data.tokens.windows import TokenSource, tokens_before
from megaegpt.labels import IGNORE


class ChunkContents(abc.ABC):
    """What one rank reads of chunks, and what all of a tensor-parallel group compute of it."""

    @abc.abstractmethod
    def blank(self, count: int) -> tuple[Tensor, ...]:
        """Make inputs of as many chunks, for a rank that could not read its own: computing is
        collective.
        """

    @abc.abstractmethod
    def read(self, chunks: range) -> tuple[Tensor, ...]:
        """Read the inputs of chunks."""

    @abc.abstractmethod
    def compute(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        """Compute the stored arrays by name, (n, ...) each, of inputs that are on the device."""


class EncodedChunks(ChunkContents):
    """The frozen encoder's states and the last one of each chunk.

    Args:
        spec: of the store.
        stream: the tokens.
        encode: tokens (n, S) int64 -> states (n, S, C); called with the tokens before each chunk
            (n, O) too where the store has an overlap.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        stream: TokenSource,
        encode: Callable[..., Tensor],
    ) -> None:
        self._spec, self._stream, self._encode = spec, stream, encode

    def blank(self, count: int) -> tuple[Tensor, ...]:
        tokens = torch.zeros(count, self._spec.chunk_size, dtype=torch.int64)
        before = torch.zeros(count, self._spec.overlap, dtype=torch.int64)
        return (tokens, before) if self._spec.overlap else (tokens,)

    def read(self, chunks: range) -> tuple[Tensor, ...]:
        size, overlap = self._spec.chunk_size, self._spec.overlap
        start = chunks[0] * size
        count = min(len(chunks) * size, len(self._stream) - start)
        tokens = np.zeros(len(chunks) * size, np.int64)
        tokens[:count] = self._stream.read(start, count)
        rows = [tokens.reshape(-1, size)]
        if overlap:
            begins = (chunk * size for chunk in chunks)
            rows.append(np.stack([tokens_before(self._stream, at, overlap) for at in begins]))
        return tuple(map(torch.from_numpy, rows))

    def compute(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        states = self._encode(*inputs)
        return {"features": states[:, -1:], "token_states": states}


class PredictedChunks(ChunkContents):
    """What a frozen decoder makes of stored states, and gives the tokens behind each.

    Args:
        states: the store of the encoder's states.
        stream: the tokens.
        predict: states (n, S, C) and the tokens behind each (n, S), ``IGNORE`` where the stream
            ends -> what the head reads (n, S, C), log-probabilities (n, S).
    """

    def __init__(
        self,
        states: FeatureStore,
        stream: TokenSource,
        predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self._states, self._stream, self._predict = states, stream, predict

    def blank(self, count: int) -> tuple[Tensor, ...]:
        shape = (count, self._states.spec.chunk_size)
        width = self._states.spec.hidden_size
        return torch.zeros(*shape, width), torch.zeros(shape, dtype=torch.int64)

    def read(self, chunks: range) -> tuple[Tensor, ...]:
        size = self._states.spec.chunk_size
        behind = chunks[0] * size + 1
        count = min(len(chunks) * size, len(self._stream) - behind)
        targets = np.full(len(chunks) * size, IGNORE, np.int64)
        targets[:count] = self._stream.read(behind, count)
        states = self._states.token_states(np.arange(chunks.start, chunks.stop))
        return states, torch.from_numpy(targets).view(-1, size)

    def compute(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        states, targets = inputs
        return dict(zip(PREDICTIONS, self._predict(states, targets), strict=True))
