"""What a model remembers of a text while it goes on writing it.

A decoder is fed tokens, the whole prompt first and then one by one, and gives the logits of the
next. There is one for each model, with caches, and one for all that recomputes everything each
time: the same function written naively, which the tests hold the others against.

Which tokens a model sees is a function of how many there are, never of how they were fed:

- GPT: at most its ``max_seq_len`` last tokens. When they are full the older half is forgotten, so
  that the cache is rebuilt once in ``max_seq_len / 2`` tokens and not with every token.
- EGPT: its chunks are cut from the start of the prompt. A token sees the tokens of its own chunk
  and the features of the ``num_chunks - 1`` chunks before it, numbered from the oldest one.
- DeepGPT: the tokens of its own chunk; a new chunk starts from nothing, as in training.

Shapes: B rows, T new tokens, S chunk size, N chunks, P features a chunk, C hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megaegpt.generation.caches import new_cache
from megaegpt.generation.compiled import CompiledSteps
from megaegpt.model.build import Model
from megaegpt.model.deepgpt import DeepGPT
from megaegpt.model.egpt.egpt import EGPT, Recorded, chunk_features
from megaegpt.model.egpt.token_counts import count_tokens
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT


class Decoder(Protocol):
    """One text in each row. All rows are equally long, but for those of a
    :class:`~megaegpt.generation.padded.PaddedGPTDecoder`.
    """

    def advance(self, tokens: Tensor) -> Tensor:
        """(B, T) ids that follow those so far, T >= 1 -> (B, V) logits of the next."""
        ...


def new_decoder(
    model: Model,
    encoder: FrozenEncoder | None,
    batch_size: int,
    max_tokens: int,
    *,
    use_cache: bool = True,
    steps: CompiledSteps | None = None,
) -> Decoder:
    """A decoder of ``model``, for at most ``max_tokens`` tokens a row; EGPT and DeepGPT need their
    encoder.

    ``steps`` are compiled ones, of a GPT with its head, of another model's encoder without it.
    """
    if not use_cache:
        return RecomputingDecoder(model, encoder)
    if isinstance(model, GPT):
        return GPTDecoder(model, batch_size, max_tokens, steps)
    if isinstance(model, EGPT):
        return EGPTDecoder(model, _needed(encoder), batch_size, max_tokens, steps)
    return DeepGPTDecoder(model, _needed(encoder), batch_size, max_tokens, steps)


def gpt_of(model: Model, encoder: FrozenEncoder | None) -> GPT:
    """What reads the tokens: a GPT itself, or another model's encoder."""
    return model if isinstance(model, GPT) else _needed(encoder).gpt


def context_start(length: int, max_seq_len: int) -> int:
    """The first token that a GPT sees of a text of ``length`` tokens."""
    step = max(max_seq_len // 2, 1)
    return max(-(-(length - max_seq_len) // step), 0) * step


class GPTDecoder:
    """Keys and values of the tokens the model sees, and their ids to start again from.

    However long a text becomes, what is held of it is at most ``max_seq_len`` tokens.
    """

    def __init__(
        self, model: GPT, batch_size: int, max_tokens: int, steps: CompiledSteps | None = None
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


class _Encoder:
    """The frozen encoder over the current chunk, with its cache."""

    def __init__(
        self, encoder: FrozenEncoder, batch_size: int, capacity: int, steps: CompiledSteps | None
    ) -> None:
        self._gpt = encoder.gpt
        self._step = None if steps is None else steps.lend(self, batch_size, capacity)
        self._cache = (
            new_cache(self._gpt, batch_size, capacity) if self._step is None else self._step.cache
        )

    def advance(self, tokens: Tensor) -> Tensor:
        """The chunk's next tokens (B, T) -> their states (B, T, C)."""
        if self._step is not None and tokens.shape[1] == 1:
            return self._step(tokens)
        return self._gpt.hidden_states(tokens, self._cache)

    def reset(self) -> None:
        """A new chunk begins."""
        self._cache.reset()


class EGPTDecoder:
    """The current chunk's encoder cache and states, and what is seen of the chunks before it.

    A token costs one encoder and one decoder position, however long the text; the first of a chunk
    adds the ``(N - 1) * P`` positions of its memory.
    """

    def __init__(
        self,
        model: EGPT,
        encoder: FrozenEncoder,
        batch_size: int,
        max_tokens: int,
        steps: CompiledSteps | None = None,
    ) -> None:
        egpt, config = model.config.egpt, model.config
        self._model = model
        self._held = egpt.num_chunks - 1
        weight = model.head.weight
        capacity = min(egpt.chunk_size, max_tokens)
        self._encoder = _Encoder(encoder, batch_size, capacity, steps)
        self._local_cache = new_cache(model, batch_size, capacity) if egpt.local_attention else None
        self._states = weight.new_empty(batch_size, egpt.chunk_size, config.hidden_size)
        self._features = weight.new_empty(
            batch_size, 0, egpt.features_per_chunk, config.hidden_size
        )
        self._memory: Recorded | None = None
        self._tokens = torch.empty(
            batch_size, egpt.chunk_size, dtype=torch.long, device=weight.device
        )
        self._counts = torch.empty(  # (B, n, V) of the chunks before, where they are mixed in
            batch_size, 0, config.padded_vocab_size, device=weight.device
        )
        self._offset = 0  # tokens of the current chunk

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        size = self._model.config.egpt.chunk_size
        # Chunks of a long prompt that its last one does not see are not encoded at all.
        unseen = (tokens.shape[1] - 1) // size - self._held
        if self._offset == 0 and unseen > 0:
            tokens = tokens[:, unseen * size :]
        room = size - self._offset
        for piece in (tokens[:, :room], *tokens[:, room:].split(size, dim=1)):
            if piece.shape[1] == 0:
                continue
            if self._offset == size:
                self._finish_chunk()
            states = self._encode(piece)
        hidden = self._decode(states)
        logits = self._model.head.full_logits(hidden)
        if self._model.counts is None:
            return logits
        mixture = self._model.next_mixture(hidden, self._features, self._counts)
        return mixture.log_probabilities(logits.unsqueeze(1)).squeeze(1)

    def _encode(self, tokens: Tensor) -> Tensor:
        """The encoder's states of the current chunk's next tokens: (B, T) -> (B, T, C)."""
        end = self._offset + tokens.shape[1]
        states = self._encoder.advance(tokens)
        self._states[:, self._offset : end] = states
        self._tokens[:, self._offset : end] = tokens
        states = self._states[:, self._offset : end]
        self._offset = end
        return states

    def _finish_chunk(self) -> None:
        """The current chunk becomes features; the oldest chunk leaves a full window."""
        features = chunk_features(self._states, self._model.config.egpt).unsqueeze(1)
        held = torch.cat([self._features, features], dim=1)  # (B, n, P, C)
        left = max(held.shape[1] - self._held, 0)
        self._features = held[:, left:]
        if self._model.counts is not None:
            vocab_size = self._model.config.padded_vocab_size
            counts = count_tokens(self._tokens.unsqueeze(1), vocab_size)
            self._counts = torch.cat([self._counts, counts], dim=1)[:, left:]
        self._memory = None
        self._encoder.reset()
        if self._local_cache is not None:
            self._local_cache.reset()
        self._offset = 0

    def _decode(self, states: Tensor) -> Tensor:
        """States of the chunk's newest tokens (B, T, C) -> (B, C); all but the last are read only
        where tokens see each other.
        """
        if self._memory is None:
            self._memory = self._model.record_memory(self._features)
        if self._local_cache is None:
            states = states[:, -1:]
        start, chunk = self._offset - states.shape[1], self._features.shape[1]
        return self._model.decode(states, self._memory, chunk, start, self._local_cache)[:, -1]


class DeepGPTDecoder:
    """The encoder's and the decoder's caches of the current chunk."""

    def __init__(
        self,
        model: DeepGPT,
        encoder: FrozenEncoder,
        batch_size: int,
        max_tokens: int,
        steps: CompiledSteps | None = None,
    ) -> None:
        self._model = model
        capacity = min(model.config.egpt.chunk_size, max_tokens)
        self._encoder = _Encoder(encoder, batch_size, capacity, steps)
        self._cache = new_cache(model, batch_size, capacity)
        self._offset = 0  # tokens of the current chunk

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        end = self._offset + tokens.shape[1]
        last_chunk = (end - 1) // self._model.config.egpt.chunk_size
        if last_chunk:
            end -= last_chunk * self._model.config.egpt.chunk_size
            tokens = tokens[:, -end:]
            self._encoder.reset()
            self._cache.reset()
        self._offset = end
        states = self._encoder.advance(tokens).to(self._model.head.weight.dtype)
        return self._model.head.full_logits(self._model.decode(states, self._cache)[:, -1])


class RecomputingDecoder:
    """No cache: every token runs the model over all that it sees, in the form used in training."""

    def __init__(self, model: Model, encoder: FrozenEncoder | None) -> None:
        self._model, self._encoder = model, encoder
        self._tokens: Tensor | None = None

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        if self._tokens is not None:
            tokens = torch.cat([self._tokens, tokens], dim=1)
        self._tokens = tokens
        model = self._model
        if isinstance(model, GPT):
            start = context_start(tokens.shape[1], model.config.max_seq_len)
            return model.head.full_logits(model.hidden_states(tokens[:, start:])[:, -1])
        window = self._window(tokens)
        states = _needed(self._encoder)(window).to(model.head.weight.dtype)
        last = (tokens.shape[1] - 1) % model.config.egpt.chunk_size
        if isinstance(model, DeepGPT):
            return model.head.full_logits(model.hidden_states(states)[:, -1, last])
        features = chunk_features(states[:, :-1], model.config.egpt)
        hidden = model.hidden_states(states, features)
        logits = model.head.full_logits(hidden[:, -1, last])
        if model.counts is None:
            return logits
        mixture = model.mixture(hidden, features, window[:, :-1])
        place = (window.shape[1] - 1) * window.shape[2] + last
        newest = mixture.at(slice(place, place + 1))
        return newest.log_probabilities(logits.unsqueeze(1)).squeeze(1)

    def _window(self, tokens: Tensor) -> Tensor:
        """(B, n) ids -> (B, up to N, S) of the last chunks; the last one is filled up with tokens
        that causality hides.
        """
        egpt = self._model.config.egpt
        chunks = -(-tokens.shape[1] // egpt.chunk_size)
        padded = torch.nn.functional.pad(tokens, (0, chunks * egpt.chunk_size - tokens.shape[1]))
        return padded.unflatten(1, (chunks, egpt.chunk_size))[:, -egpt.num_chunks :]


def _needed(encoder: FrozenEncoder | None) -> FrozenEncoder:
    if encoder is None:
        raise ValueError("EGPT and DeepGPT decode the states of an encoder: pass it")
    return encoder
