"""What a token memory holds of a document's past, beyond any window.

Shapes: B rows, S chunk size, J held tokens, C hidden, H pointers, D key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megaegpt.model.egpt.token_memory import TokenMemory, mixed

KeyType = Literal["fp32", "fp16", "int8"]
KEY_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class MemoryLimits:
    """How much of a document is held."""

    tokens: int | None = None
    """Tokens before the current chunk; None: as many as a training window shows."""
    dtype: KeyType | None = None
    """Of the keys, whose numbers are between -1 and 1; None: the model's."""


AS_IN_TRAINING = MemoryLimits()


class HeldTokens:
    """Keys and successors of the last whole chunks; the oldest leave when it is full.

    Args:
        module: the memory's parameters.
        batch_size: rows.
        like: on whose device and in whose type keys are.
        limits: how much is held, and in which type.
    """

    def __init__(
        self,
        module: TokenMemory,
        batch_size: int,
        like: Tensor,
        limits: MemoryLimits = AS_IN_TRAINING,
    ) -> None:
        size = module.chunk_size
        tokens = module.window_tokens if limits.tokens is None else limits.tokens
        self._module, self.most_chunks = module, tokens // size
        shape = (batch_size, module.pointers, 0, module.dim)
        dtype = like.dtype if limits.dtype is None else KEY_TYPES[limits.dtype]
        self.keys = torch.empty(shape, dtype=dtype, device=like.device)
        self.successors = torch.empty(batch_size, 0, dtype=torch.long, device=like.device)

    def append(self, states: Tensor, successors: Tensor) -> None:
        """A chunk's encoder states (B, S, C) and the tokens behind its tokens (B, S)."""
        keys = self._module.keys(states)
        if self.keys.dtype == torch.int8:
            keys = (keys * 127).round()
        keys = keys.to(self.keys.dtype)
        most = self.most_chunks * self._module.chunk_size
        start = max(self.successors.shape[1] + successors.shape[1] - most, 0)
        self.keys = torch.cat([self.keys, keys], dim=2)[:, :, start:]
        self.successors = torch.cat([self.successors, successors], dim=1)[:, start:]

    def mix(self, states: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of what is behind tokens of the chunk after those held.

        Args:
            states: (B, T, C) of the encoder.
            hidden: (B, T, C), what the head reads.
            logits: (B, T, V) of the head.
        """
        query = self._module.ask(states, hidden)
        memory = self._module.memory(self.keys, self.successors)
        chunk = self.num_tokens // self._module.chunk_size
        return mixed(self._module, query, memory, chunk, logits)

    def precise_keys(self) -> Tensor:
        """The keys (B, H, J, D) as numbers in at least fp32, whatever they are held in."""
        if self.keys.dtype == torch.int8:
            return self.keys.float() / 127
        return self.keys.to(torch.promote_types(self.keys.dtype, torch.float32))

    @property
    def num_tokens(self) -> int:
        """Tokens held of a row."""
        return self.successors.shape[1]

    def size(self, num_tokens: int | None = None) -> str:
        """How much of a row ``num_tokens`` are, for people; None: those held now."""
        tokens = self.num_tokens if num_tokens is None else num_tokens
        each = self.keys.shape[1] * self.keys.shape[3] * self.keys.itemsize
        each += self.successors.itemsize
        return f"{tokens:,} tokens in {tokens * each / 2**20:,.1f} MiB"
