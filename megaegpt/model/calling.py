"""From a batch of tokens to a call of the model, for each kind of model.

``prepare`` runs on the CPU (it may read stored features), so it can be done ahead of the step;
``arguments`` and ``nats`` run on the device: what is not stored is encoded, the model called once.

Shapes: B samples, T tokens of a sequence, N chunks, S chunk size, P features a chunk, C hidden.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.data.features.store import FeatureStore
from megaegpt.model.egpt.egpt import chunk_features
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.loss import IGNORE

Reduction = Literal["sum", "none"]
MicroBatch = Mapping[str, Tensor]


class ModelInputs(abc.ABC):
    """How one kind of model is fed."""

    @abc.abstractmethod
    def prepare(self, tokens: Tensor, targets: Tensor, *extras: Tensor) -> dict[str, Tensor]:
        """Tokens and targets (B, L) int64, and what the samples have besides (chunk windows: the
        chunk ids (B, N)), all on the CPU -> a micro-batch, still on the CPU.
        """

    @abc.abstractmethod
    def arguments(self, batch: MicroBatch) -> dict[str, Tensor]:
        """What the model is called with, but the targets; the micro-batch is on the device."""

    def nats(
        self, model: Callable[..., Tensor], batch: MicroBatch, reduction: Reduction = "sum"
    ) -> Tensor:
        """One call of ``model`` on a micro-batch that is on the device -> nats of its targets."""
        return model(**self.arguments(batch), targets=batch["targets"], reduction=reduction)


class SequenceInputs(ModelInputs):
    """GPT: tokens in, nats out."""

    def prepare(self, tokens: Tensor, targets: Tensor, *extras: Tensor) -> dict[str, Tensor]:
        """(B, T) each; ``extras`` may be the segments (B, T) of packed texts."""
        batch = {"tokens": tokens, "targets": targets}
        return batch if not extras else batch | {"segments": extras[0]}

    def arguments(self, batch: MicroBatch) -> dict[str, Tensor]:
        """See :class:`ModelInputs`."""
        return {name: batch[name] for name in ("tokens", "segments") if name in batch}


class ChunkInputs(ModelInputs):
    """EGPT and DeepGPT: frozen-encoder states of every chunk, and EGPT's features of earlier ones.

    Args:
        config: of the decoder.
        encoder: encodes, without gradient, what is not read from a store.
        dtype: what the model computes in.
        history: store of the earlier chunks' features (egpt); None: pooled from the states.
        token_states: store of the current chunks' states; None: encoded in the loop.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: FrozenEncoder,
        dtype: torch.dtype,
        history: FeatureStore | None = None,
        token_states: FeatureStore | None = None,
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._dtype = dtype
        self._history = history if config.kind == "egpt" else None
        self._token_states = token_states

    def prepare(self, tokens: Tensor, targets: Tensor, *extras: Tensor) -> dict[str, Tensor]:
        """Tokens and targets (B, N * S) -> (B, N, S), and what the stores hold of their chunks,
        whose ids (B, N) are the first of ``extras``; without stores any number of chunks.
        """
        chunks = (-1, self._config.egpt.chunk_size)
        batch = {
            "tokens": tokens.unflatten(1, chunks),
            "targets": targets.unflatten(1, chunks),
        }
        if self._history is not None:
            # The partial chunk at a split's end is not stored; no target comes after it.
            last = self._history.spec.num_chunks - 1
            batch["features"] = self._history.history(_ids(extras)[:, :-1].clamp(max=last))
        store = self._token_states
        if store is not None and bool((_ids(extras) < store.spec.num_chunks).all()):
            batch["token_states"] = store.token_states(_ids(extras))
        return batch

    def arguments(self, batch: MicroBatch) -> dict[str, Tensor]:
        """See :class:`ModelInputs`; encodes what is not stored."""
        if "token_states" in batch:
            states = batch["token_states"].to(self._dtype)  # (B, N, S, C)
        else:
            states = self._encoder(batch["tokens"]).to(self._dtype)
        if self._config.kind == "deepgpt":
            return {"token_states": states}
        if "features" in batch:
            features = batch["features"].to(self._dtype)  # (B, N - 1, P, C)
        else:
            features = chunk_features(states[:, :-1], self._config.egpt)
        arguments = {"token_states": states, "features": features}
        if self._config.egpt.token_counts:
            arguments["earlier_tokens"] = batch["tokens"][:, :-1]
        return arguments


class InstructionInputs(ModelInputs):
    """Rows of instruction data: the answers are learned, and padding that a micro-batch does not
    need is cut off.

    Args:
        inputs: of the model that is fed.
        multiple_of: rows are cut to a multiple of it (a chunk, for egpt and deepgpt).
    """

    def __init__(self, inputs: ModelInputs, multiple_of: int) -> None:
        self._inputs = inputs
        self._multiple_of = multiple_of

    def prepare(self, tokens: Tensor, targets: Tensor, *extras: Tensor) -> dict[str, Tensor]:
        """Tokens, targets and what is learned (B, T); of packed rows, the segments (B, T)."""
        learned, *segments = extras
        used = int(learned.any(0).nonzero()[-1]) + 1 if learned.any() else 1
        width = min(-(-used // self._multiple_of) * self._multiple_of, tokens.shape[1])
        targets = targets.where(learned, IGNORE)
        return self._inputs.prepare(*(x[:, :width] for x in (tokens, targets, *segments)))

    def arguments(self, batch: MicroBatch) -> dict[str, Tensor]:
        """See :class:`ModelInputs`."""
        return self._inputs.arguments(batch)


def _ids(extras: tuple[Tensor, ...]) -> Tensor:
    if not extras:
        raise ValueError("stored features are read by chunk id, but the batch has none")
    return extras[0]
