"""How an EGPT is called: its encoder's states, and what is kept of earlier chunks.

Shapes: B windows, N chunks, n those of a rank under chunk parallelism, S chunk size, C hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.data.features.store import PREDICTIONS, FeatureStore
from megaegpt.data.tokens.batch import Batch
from megaegpt.labels import NOTHING_BEFORE
from megaegpt.model.calling import ChunkInputs, Encode, Reduction, stored_ids
from megaegpt.parallel.chunks import ChunkShares


class EGPTInputs(ChunkInputs):
    """Encoder states of every chunk, and the features (and tokens) of earlier ones.

    Args:
        config: of the decoder.
        encode: encodes what is not read from a store.
        dtype: what the model computes in.
        token_states: store of the chunks' states; None: they are encoded in the loop.
        history: store of the earlier chunks' features; None: they are taken from the states.
        shares: of the chunks; each rank's features are gathered when the model is called.
        predictions: store of what the decoder, being frozen, predicts without its token memory;
            None: it predicts in the loop.
    """

    def __init__(
        self,
        config: ModelConfig,
        encode: Encode,
        dtype: torch.dtype,
        token_states: FeatureStore | None = None,
        history: FeatureStore | None = None,
        shares: ChunkShares | None = None,
        predictions: FeatureStore | None = None,
    ) -> None:
        super().__init__(config, encode, dtype, token_states, shares)
        self._history, self._predictions = history, predictions

    def prepare(self, batch: Batch) -> Batch:
        """As for DeepGPT, and ``features`` (B, N - 1, C) if they are stored, with shares those
        of this rank's chunks (B, n, C); where predictions are, ``hidden`` (B, n, S, C) and
        ``log_probabilities`` (B, n, S).
        """
        prepared = super().prepare(batch)
        if (store := self._predictions) is not None:
            prepared = {**prepared, **store.predictions(stored_ids(prepared, store))}
        if (store := self._history) is None:
            return prepared
        # A partial chunk at a text's end need not be stored: nothing comes after it.
        ids = stored_ids(prepared, store)
        read = ids[:, :-1] if self._shares is None else ids
        return {**prepared, "features": store.history(read)}

    def _share(self, whole: dict[str, Tensor], shares: ChunkShares) -> dict[str, Tensor]:
        """The ids of the whole window too (B, 1 + N * S), which all ranks read of their shards."""
        own = super()._share(whole, shares)
        if self._config.egpt.token_memory:
            missing = own["tokens"].shape[1] * shares.grid.cp_size - whole["tokens"].shape[1]
            own["text"] = F.pad(_text(whole), (0, missing * self._config.egpt.chunk_size))
        return own

    def loss(
        self, model: Callable[..., Tensor], batch: Batch, reduction: Reduction = "sum"
    ) -> Tensor:
        if self._shares is not None:
            model = functools.partial(model, shares=self._shares)
        if PREDICTIONS[0] in batch:
            hidden, log_probabilities = (batch[name] for name in PREDICTIONS)
            predicted = (hidden.to(self._dtype), log_probabilities)
            model = functools.partial(model, predicted=predicted)
        return super().loss(model, batch, reduction)

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        arguments = super().arguments(batch)
        states = arguments["token_states"]  # (B, N, S, C)
        if "features" in batch:
            features = batch["features"].to(self._dtype)
        else:
            earlier = states[:, :-1] if self._shares is None else states
            features = earlier[:, :, -1]
        if self._shares is not None:
            features = self._of_all_ranks(features, self._shares)
        arguments["features"] = features
        if self._config.egpt.token_memory:
            arguments["text"] = batch["text"] if "text" in batch else _text(batch)
        return arguments

    def _of_all_ranks(self, features: Tensor, shares: ChunkShares) -> Tensor:
        """Every rank's (B, n, C) -> (B, N - 1, C); nobody reads them in a model without a
        history, and the last chunk's are read by no chunk.
        """
        if not self._config.egpt.history:
            return features[:, :0]
        return shares.gather(features)[:, :-1]


def _text(batch: Batch) -> Tensor:
    """The ids of windows (B, N, S) and of the token before each, (B, 1 + N * S)."""
    tokens, before = batch["tokens"].flatten(1), batch.get("before")
    if before is None:
        before = tokens.new_full((len(tokens), 1), NOTHING_BEFORE)
    return torch.cat([before[:, -1:], tokens], dim=1)
