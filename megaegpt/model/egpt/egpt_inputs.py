"""How an EGPT is called: its encoder's states, and what is kept of earlier chunks.

Shapes: B windows, N chunks, S chunk size, P features a chunk, C hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.data.features.store import FeatureStore
from megaegpt.data.tokens.batch import Batch
from megaegpt.labels import NOTHING_BEFORE
from megaegpt.model.calling import ChunkInputs, Encode, chunk_ids_of
from megaegpt.model.egpt.egpt import chunk_features


class EGPTInputs(ChunkInputs):
    """Encoder states of every chunk, and the features (and tokens) of earlier ones.

    Args:
        config: of the decoder.
        encode: encodes what is not read from a store.
        dtype: what the model computes in.
        token_states: store of the chunks' states; None: they are encoded in the loop.
        history: store of the earlier chunks' features; None: they are pooled from the states.
    """

    def __init__(
        self,
        config: ModelConfig,
        encode: Encode,
        dtype: torch.dtype,
        token_states: FeatureStore | None = None,
        history: FeatureStore | None = None,
    ) -> None:
        super().__init__(config, encode, dtype, token_states)
        self._history = history

    def prepare(self, batch: Batch) -> Batch:
        """As for DeepGPT, and ``features`` (B, N - 1, P, C) if they are stored."""
        prepared = super().prepare(batch)
        if self._history is None:
            return prepared
        # The partial chunk at a split's end is not stored; no target comes after it.
        earlier = chunk_ids_of(batch)[:, :-1].clamp(max=self._history.spec.num_chunks - 1)
        return {**prepared, "features": self._history.history(earlier)}

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        arguments = super().arguments(batch)
        states = arguments["token_states"]  # (B, N, S, C)
        if "features" in batch:
            arguments["features"] = batch["features"].to(self._dtype)
        else:
            arguments["features"] = chunk_features(states[:, :-1], self._config.egpt)
        if self._config.egpt.token_memory:
            tokens, before = batch["tokens"].flatten(1), batch.get("before")
            if before is None:
                before = tokens.new_full((len(tokens), 1), NOTHING_BEFORE)
            arguments["text"] = torch.cat([before[:, -1:], tokens], dim=1)
        return arguments
