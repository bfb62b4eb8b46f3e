"""How a model is called: from a batch of tokens to its arguments, for each kind of model.

Training, evaluation, scoring, memory traces and benchmarks call models through here.
:meth:`ModelInputs.prepare` runs on the CPU, ahead of the step, and may read stored features;
:meth:`ModelInputs.arguments` and :meth:`ModelInputs.loss` run on the device, where what is not
stored is encoded.

Shapes: B samples, T tokens of a sequence, N chunks, n those of a rank under chunk parallelism, S
chunk size, O tokens of the encoder's overlap, C hidden.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.data.features.store import FeatureStore
from megaegpt.data.tokens.batch import Batch
from megaegpt.labels import IGNORE, NOTHING_BEFORE
from megaegpt.parallel.chunks import ChunkShares

Reduction = Literal["sum", "none"]

Encode = Callable[..., Tensor]
"""Tokens (B, N, S) -> encoder states (B, N, S, C), without gradient; called with the tokens before
each chunk (B, N, O) too where the encoder has an overlap."""


class ModelInputs(abc.ABC):
    """How one kind of model is fed; see :mod:`megaegpt.data.tokens.batch` for batches."""

    def prepare(self, batch: Batch) -> Batch:
        """A batch of samples on the CPU -> what :meth:`arguments` needs, still on the CPU."""
        return batch

    @abc.abstractmethod
    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """Make the model's keyword arguments but ``targets`` of a batch that is on the device."""

    def loss(
        self, model: Callable[..., Tensor], batch: Batch, reduction: Reduction = "sum"
    ) -> Tensor:
        """One call of ``model`` on a prepared batch that is on the device -> the loss of its
        targets in nats: their sum, or each (of the targets' shape) with ``reduction="none"``.
        """
        return model(**self.arguments(batch), targets=batch["targets"], reduction=reduction)


class SequenceInputs(ModelInputs):
    """GPT: tokens, and the segments of packed texts."""

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("tokens", "segments") if name in batch}


class ChunkInputs(ModelInputs):
    """DeepGPT: the frozen encoder's states of every chunk.

    Args:
        config: of the decoder.
        encode: encodes what is not read from a store.
        dtype: what the model computes in.
        token_states: store of the chunks' states; None: they are encoded in the loop.
        shares: under chunk parallelism, which chunks this rank has: it reads, encodes and predicts
            no others.
    """

    def __init__(
        self,
        config: ModelConfig,
        encode: Encode,
        dtype: torch.dtype,
        token_states: FeatureStore | None = None,
        shares: ChunkShares | None = None,
    ) -> None:
        self._config = config
        self._encode = encode
        self._dtype = dtype
        self._token_states = token_states
        self._shares = shares

    def prepare(self, batch: Batch) -> Batch:
        """Tokens and targets (B, N * S) -> (B, N, S), and ``token_states`` (B, N, S, C) if they
        are stored; without stores any number of chunks. With shares all but the targets is of this
        rank's chunks (B, n, ...), with the tokens before each of them (B, n, O) where the encoder
        sees them.
        """
        chunks = (-1, self._config.egpt.chunk_size)
        prepared = dict(batch)
        for name in ("tokens", "targets"):
            prepared[name] = batch[name].unflatten(1, chunks)
        if self._shares is not None:
            prepared = self._share(prepared, self._shares)
        if (store := self._token_states) is not None:
            if self._shares is None:
                _check_stored(prepared, store)
            prepared["token_states"] = store.token_states(stored_ids(prepared, store))
        return prepared

    def _share(self, whole: dict[str, Tensor], shares: ChunkShares) -> dict[str, Tensor]:
        """This rank's part of windows. Chunks of which there is not one for every rank are filled
        up with some from which nothing is learned.
        """
        missing = -whole["tokens"].shape[1] % shares.grid.cp_size
        tokens = F.pad(whole["tokens"], (0, 0, 0, missing))
        targets = F.pad(whole["targets"], (0, 0, 0, missing), value=IGNORE)
        own = {**whole, "tokens": shares.own(tokens), "targets": targets}
        if overlap := self._config.encoder.overlap:
            own["overlaps"] = shares.own(overlapped(tokens, whole.get("before"), overlap))
        if "chunk_ids" in whole:
            own["chunk_ids"] = shares.own(whole["chunk_ids"])
        return own

    def loss(
        self, model: Callable[..., Tensor], batch: Batch, reduction: Reduction = "sum"
    ) -> Tensor:
        if self._shares is not None:  # targets come whole: a step's are counted by samples
            batch = {**batch, "targets": self._shares.own(batch["targets"])}
        return super().loss(model, batch, reduction)

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        if "token_states" in batch:
            return {"token_states": batch["token_states"].to(self._dtype)}
        if "overlaps" in batch:
            states = self._encode(batch["tokens"], batch["overlaps"]).to(self._dtype)
        else:
            states = self._encoded(batch["tokens"], batch.get("before"))
        return {"token_states": states}

    def _encoded(self, tokens: Tensor, before: Tensor | None) -> Tensor:
        """States (B, N, S, C) of tokens (B, N, S) behind the tokens ``before`` them (B, O), if the
        encoder has an overlap; None: behind nothing.
        """
        overlap = self._config.encoder.overlap
        if not overlap:
            return self._encode(tokens).to(self._dtype)
        return self._encode(tokens, overlapped(tokens, before, overlap)).to(self._dtype)


def overlapped(tokens: Tensor, before: Tensor | None, overlap: int) -> Tensor:
    """The last ``overlap`` tokens before each chunk of tokens (B, N, S), whose first one has those
    ``before`` it (B, O), or none -> (B, N, O); -1 where nothing precedes.
    """
    if before is None:
        before = tokens.new_full((len(tokens), overlap), NOTHING_BEFORE)
    return torch.cat([before.unsqueeze(1), tokens[:, :-1, -overlap:]], dim=1)


def stored_ids(batch: Batch, store: FeatureStore) -> Tensor:
    """The chunks (B, N) to read of a store: in the place of those behind the end of its text, in
    which nothing is predicted, its last.
    """
    return chunk_ids_of(batch).clamp(max=store.spec.num_chunks - 1)


def _check_stored(batch: Batch, store: FeatureStore) -> None:
    missing = chunk_ids_of(batch) >= store.spec.num_chunks
    if bool(missing.any()) and bool((batch["targets"][missing] != IGNORE).any()):
        raise ValueError("tokens are predicted in chunks of which no states are stored")


def chunk_ids_of(batch: Batch) -> Tensor:
    """The chunks' numbers (B, N) in their stream.

    Raises:
        ValueError: the samples have none, so nothing can be read of a store.
    """
    if "chunk_ids" not in batch:
        raise ValueError("stored features are read by chunk id, but the batch has none")
    return batch["chunk_ids"]
