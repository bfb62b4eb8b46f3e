"""Decoders: the state of a model between the tokens of a text that it generates.

A decoder is fed tokens, the whole prompt first and then one by one, and gives the logits of the
next. Each kind of model has one, with caches; which, is chosen in :mod:`megaegpt.model.build`.

Which tokens a model sees is a function of how many there are, never of how they were fed:

- GPT: at most its ``max_seq_len`` last tokens. When they are full the older half is forgotten, so
  that the cache is rebuilt once in ``max_seq_len / 2`` tokens and not with every token.
- EGPT: its chunks are cut from the start of the prompt. A token sees the tokens of its own chunk
  and the features of the ``num_chunks - 1`` chunks before it, numbered from the oldest one.
- DeepGPT: the tokens of its own chunk; a new chunk starts from nothing, as in training.

Shapes: B rows, T new tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megaegpt.errors import ConfigError, first_line
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.base import LanguageModel
from megaegpt.model.deepgpt import DeepGPT
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT


class Decoder(Protocol):
    """One text in each row. All rows are equally long, but for those of a
    :class:`~megaegpt.generation.padded.PaddedGPTDecoder`.
    """

    def advance(self, tokens: Tensor) -> Tensor:
        """(B, T) ids that follow those so far, T >= 1 -> (B, V) logits of the next."""
        ...


class DecodingStep(Protocol):
    """One token through a GPT, compiled."""

    cache: KVCache

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, 1) ids -> (B, V) logits, or (B, 1, C) states of a GPT without its head."""
        ...


class DecodingSteps(Protocol):
    """Compiled steps to borrow; see :class:`megaegpt.generation.compiled.CompiledSteps`."""

    def lend(self, borrower: object, batch_size: int, capacity: int) -> DecodingStep:
        """A step that is ``borrower``'s as long as that lives, with an empty cache."""
        ...


def context_start(length: int, max_seq_len: int) -> int:
    """The first token that a GPT sees of a text of ``length`` tokens."""
    step = max(max_seq_len // 2, 1)
    return max(-(-(length - max_seq_len) // step), 0) * step


def new_cache(model: LanguageModel, batch_size: int, capacity: int) -> KVCache:
    """An empty cache in the type and on the device of ``model``, for ``capacity`` tokens a row.

    Raises:
        ConfigError: it does not fit into memory.
    """
    dtype = model.head.weight.dtype
    try:
        return KVCache(model.config, model.grid, batch_size, capacity, dtype=dtype)
    except RuntimeError as error:  # torch's allocators raise this, on a GPU a subclass of it
        raise ConfigError(
            f"the keys and values of {batch_size:,} texts of up to {capacity:,} tokens do not fit "
            f"into memory: write fewer or shorter texts at once ({first_line(error)})"
        ) from None


class GPTDecoder:
    """Keys and values of the tokens the model sees, and their ids to start again from.

    However long a text becomes, what is held of it is at most ``max_seq_len`` tokens.
    """

    def __init__(
        self, model: GPT, batch_size: int, max_tokens: int, steps: DecodingSteps | None = None
    ) -> None:
        self._model = model
        self._max_seq_len = model.config.max_seq_len
        capacity = min(self._max_seq_len, max_tokens)
        self._step = None if steps is None else steps.lend(self, batch_size, capacity)
        self._cache = (
            new_cache(model, batch_size, capacity) if self._step is None else self._step.cache
        )
        self._seen = torch.empty(  # the ids of the tokens in the cache
            batch_size, capacity, dtype=torch.long, device=model.grid.device
        )
        self._start = self._length = 0

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """(B, T) ids that follow those so far -> (B, V) logits of the next."""
        self._length += tokens.shape[1]
        start = context_start(self._length, self._max_seq_len)
        if start != self._start:
            text = torch.cat([self._seen[:, : self._cache.length], tokens], dim=1)
            tokens = text[:, start - self._length :]
            self._cache.reset()
            self._start = start
        self._seen[:, self._cache.length : self._length - start] = tokens
        if self._step is not None and tokens.shape[1] == 1:
            return self._step(tokens)
        hidden = self._model.hidden_states(tokens, self._cache)[:, -1]
        return self._model.head.full_logits(hidden)


class ChunkEncoder:
    """The frozen encoder over the current chunk, with its cache."""

    def __init__(
        self,
        encoder: FrozenEncoder,
        batch_size: int,
        capacity: int,
        steps: DecodingSteps | None,
        overlap: int = 0,
    ) -> None:
        self._gpt = encoder.gpt
        capacity += overlap
        self._step = None if steps is None else steps.lend(self, batch_size, capacity)
        self._cache = (
            new_cache(self._gpt, batch_size, capacity) if self._step is None else self._step.cache
        )

    def advance(self, tokens: Tensor) -> Tensor:
        """The chunk's next tokens (B, T) -> their states (B, T, C)."""
        if self._step is not None and tokens.shape[1] == 1:
            return self._step(tokens)
        return self._gpt.hidden_states(tokens, self._cache)

    def reset(self, before: Tensor) -> None:
        """A new chunk begins behind the tokens ``before`` it (B, O); O is 0 without an overlap."""
        self._cache.reset()
        if before.shape[1]:
            self._gpt.hidden_states(before, self._cache)


class DeepGPTDecoder:
    """The encoder's and the decoder's caches of the current chunk."""

    def __init__(
        self,
        model: DeepGPT,
        encoder: FrozenEncoder,
        batch_size: int,
        max_tokens: int,
        steps: DecodingSteps | None = None,
    ) -> None:
        self._model = model
        capacity = min(model.config.egpt.chunk_size, max_tokens)
        self._overlap = model.config.encoder.overlap
        self._encoder = ChunkEncoder(encoder, batch_size, capacity, steps, self._overlap)
        self._cache = new_cache(model, batch_size, capacity)
        device = model.grid.device
        self._recent = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        self._offset = 0  # tokens of the current chunk

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        end = self._offset + tokens.shape[1]
        last_chunk = (end - 1) // self._model.config.egpt.chunk_size
        text = torch.cat([self._recent, tokens], dim=1)  # from at least an overlap before
        if last_chunk:
            end -= last_chunk * self._model.config.egpt.chunk_size
            tokens = tokens[:, -end:]
            begin = text.shape[1] - end
            self._encoder.reset(text[:, begin - self._overlap : begin])
            self._cache.reset()
        self._recent = text[:, text.shape[1] - min(self._overlap, text.shape[1]) :]
        self._offset = end
        states = self._encoder.advance(tokens).to(self._model.head.weight.dtype)
        return self._model.head.full_logits(self._model.decode(states, self._cache)[:, -1])
