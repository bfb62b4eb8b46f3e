"""How an EGPT writes on: what it holds of the current chunk, and of those before it.

Shapes: B rows, T new tokens, S chunk size, N chunks, C hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaegpt.model.decoding import ChunkEncoder, DecodingSteps, new_cache
from megaegpt.model.egpt.egpt import EGPT, Recorded
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING, HeldTokens, MemoryLimits
from megaegpt.model.encoder import FrozenEncoder


class EGPTDecoder:
    """The current chunk's encoder cache and states, and what is seen of the chunks before it.

    A token costs one encoder and one decoder position, however long the text; the first of a chunk
    adds the ``(N - 1) * P`` positions of its memory. With a token memory it is also compared with
    the keys of as many tokens of earlier chunks as ``limits`` allow.
    """

    def __init__(
        self,
        model: EGPT,
        encoder: FrozenEncoder,
        batch_size: int,
        max_tokens: int,
        steps: DecodingSteps | None = None,
        limits: MemoryLimits = AS_IN_TRAINING,
    ) -> None:
        egpt, config = model.config.egpt, model.config
        self._model = model
        self._held = egpt.num_chunks - 1
        weight = model.head.weight
        capacity = min(egpt.chunk_size, max_tokens)
        self._overlap = config.encoder.overlap
        self._encoder = ChunkEncoder(encoder, batch_size, capacity, steps, self._overlap)
        places = capacity + int(egpt.attention_sink)
        self._local_cache = new_cache(model, batch_size, places) if egpt.local_attention else None
        self._states = weight.new_empty(batch_size, egpt.chunk_size, config.hidden_size)
        self._features = weight.new_empty(batch_size, 0, config.hidden_size)
        self._memory: Recorded | None = None
        self._tokens = torch.empty(
            batch_size, egpt.chunk_size, dtype=torch.long, device=weight.device
        )
        self._held_tokens: HeldTokens | None = None
        if model.token_memory is not None:
            self._held_tokens = HeldTokens(model.token_memory, batch_size, weight, limits)
        self._offset = 0  # tokens of the current chunk

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        size = self._model.config.egpt.chunk_size
        # Chunks of a long prompt that its last one does not see are not encoded at all.
        held = self._held if self._held_tokens is None else self._held_tokens.most_chunks
        unseen = (tokens.shape[1] - 1) // size - max(held, self._held)
        if self._offset == 0 and unseen > 0:
            begin = unseen * size
            self._encoder.reset(tokens[:, begin - self._overlap : begin])
            if self._held_tokens is not None:
                self._held_tokens.begin_behind(tokens[:, begin - 1])
            tokens = tokens[:, begin:]
        room = size - self._offset
        for piece in (tokens[:, :room], *tokens[:, room:].split(size, dim=1)):
            if piece.shape[1] == 0:
                continue
            if self._offset == size:
                self._finish_chunk()
            states = self._encode(piece)
        hidden = self._decode(states)
        logits = self._model.head.full_logits(hidden)
        if self._held_tokens is not None:
            newest = self._states[:, self._offset - 1 : self._offset]
            return self._held_tokens.mix(newest, hidden.unsqueeze(1), logits.unsqueeze(1))[:, 0]
        return logits

    def _encode(self, tokens: Tensor) -> Tensor:
        """The encoder's states of the current chunk's next tokens: (B, T) -> (B, T, C)."""
        end = self._offset + tokens.shape[1]
        states = self._encoder.advance(tokens)
        self._states[:, self._offset : end] = states
        self._tokens[:, self._offset : end] = tokens
        states = self._states[:, self._offset : end]
        if self._held_tokens is not None:
            self._held_tokens.append(states, tokens)
        self._offset = end
        return states

    def _finish_chunk(self) -> None:
        """The current chunk becomes a feature, and the oldest one leaves a full window."""
        size = self._model.config.egpt.chunk_size
        held = torch.cat([self._features, self._states[:, -1:]], dim=1)  # (B, n, C)
        self._features = held[:, max(held.shape[1] - self._held, 0) :]
        if self._held_tokens is not None:
            self._held_tokens.finish_chunk()
        self._memory = None
        self._encoder.reset(self._tokens[:, size - self._overlap :])
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
