"""An EGPT whose token memory goes on over a whole text, and does not end with each window.

Shapes: N chunks of a window, S chunk size, C hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megaegpt.data.features.store import FeatureStore
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.windows import TokenSource
from megaegpt.errors import ConfigError
from megaegpt.evaluation.text import evaluate_text
from megaegpt.evaluation.text_loss import Evaluation
from megaegpt.generation.trained import LoadedModel
from megaegpt.labels import IGNORE
from megaegpt.model.calling import Encode, chunk_ids_of
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.egpt_inputs import EGPTInputs
from megaegpt.model.egpt.held_tokens import HeldTokens, MemoryLimits
from megaegpt.parallel.grid import ProcessGrid


class CarriedMemory(EGPTInputs):
    """Windows of one text in order, one by one. A chunk sees those before it, of earlier windows
    too, that are held when a text is written.

    Args:
        model: with a token memory.
        encode: its frozen encoder.
        dtype: what the model computes in.
        limits: what is held before a chunk; the oldest chunks leave.
        token_states: store of the text's encoder states; None: it is encoded.
        predictions: store of what the model predicts of it without a memory; None: it does.
    """

    def __init__(
        self,
        model: EGPT,
        encode: Encode,
        dtype: torch.dtype,
        limits: MemoryLimits,
        token_states: FeatureStore | None = None,
        predictions: FeatureStore | None = None,
    ) -> None:
        super().__init__(model.config, encode, dtype, token_states, predictions=predictions)
        self._model, self._limits = model, limits
        self._held, self._next_chunk = self._nothing(), 0

    def _nothing(self) -> HeldTokens:
        memory = self._model.token_memory
        if memory is None:
            raise ConfigError("a memory is carried on by an egpt with token_memory only")
        return HeldTokens(memory, 1, self._model.head.weight, self._limits)

    @property
    def held(self) -> HeldTokens:
        """What is held now."""
        return self._held

    def loss(
        self,
        model: Callable[..., Tensor],
        batch: Batch,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        """The loss of a window, which is held afterwards.

        Raises:
            ValueError: not one window, or not the one behind that before.
        """
        first, *_ = numbers = chunk_ids_of(batch).flatten().tolist()
        if first == 0:
            self._held, self._next_chunk = self._nothing(), 0
        if len(batch["tokens"]) != 1 or first != self._next_chunk:
            raise ValueError("a memory is carried over windows in order, one at a time")
        batch = {**batch, **self.arguments(batch)}  # the states are held too
        past = {
            "past_keys": self._held.precise_keys(),
            "past_text": self._held.earlier.text,
            "from_chunk": self._first_held(batch["tokens"]),
        }
        nats = super().loss(functools.partial(model, **past), batch, reduction)
        whole = int((batch["targets"] != IGNORE).all(-1).sum())  # behind them the text ends
        for chunk in range(whole):
            self._held.append(batch["token_states"][:, chunk], batch["tokens"][:, chunk])
            self._held.finish_chunk()
        self._next_chunk += len(numbers)
        return nats

    def _first_held(self, tokens: Tensor) -> Tensor:
        """Which chunk is the oldest held before each of those of tokens (1, N, S): (1, N), counted
        from the oldest before the window.
        """
        size = self._config.egpt.chunk_size
        before = self._held.num_tokens // size + torch.arange(tokens.shape[1], device=tokens.device)
        return (before - self._held.most_chunks).clamp(min=0).unsqueeze(0)


def evaluate_with_memory(
    loaded: LoadedModel,
    source: TokenSource,
    grid: ProcessGrid,
    dtype: torch.dtype,
    limits: MemoryLimits,
) -> tuple[Evaluation, HeldTokens]:
    """Loss on a text, window after window, and what was held at its end.

    Raises:
        ConfigError: the model has no token memory, a chunk is more than the limits allow, or there
            are several data-parallel ranks: the windows follow one another.
    """
    if not isinstance(loaded.model, EGPT) or loaded.encoder is None:
        raise ConfigError("--memory-tokens is for an egpt with token_memory")
    if grid.replica_size > 1:
        raise ConfigError(
            "--memory-tokens carries a memory from window to window, which is one process's work: "
            "start one, or as many as --tensor-parallel-size"
        )
    inputs = CarriedMemory(loaded.model, loaded.encoder, dtype, limits)
    return evaluate_text(loaded, source, inputs, grid, batch_size=1), inputs.held
