"""What a token memory holds of a document's past, beyond any window.

Shapes: B rows, T new tokens, S chunk size, J tokens of whole chunks, C hidden, H pointers, D key
width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megaegpt.errors import ConfigError
from megaegpt.labels import NOTHING_BEFORE
from megaegpt.model.egpt.copy_attention import EarlierKeys, Keys, mean_keys
from megaegpt.model.egpt.token_memory import TokenMemory, mixed

KeyType = Literal["fp32", "fp16", "int8"]
KEY_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class MemoryLimits:
    """How much of a document is held."""

    tokens: int | None = None
    """Tokens before the current chunk, of which whole chunks are held; None: as many as a training
    window shows."""
    dtype: KeyType | None = None
    """Of the keys, whose numbers are between -1 and 1; None: the model's."""

    def most_chunks(self, module: TokenMemory) -> int:
        """Whole chunks that are held.

        Raises:
            ConfigError: so few tokens are not one chunk: nothing would be held.
        """
        size = module.chunk_size
        if self.tokens is None:
            return module.window_tokens // size
        if self.tokens < size:
            raise ConfigError(
                f"--memory-tokens {self.tokens} is less than a chunk, and whole ones are held: "
                f"give at least {size}"
            )
        return self.tokens // size


AS_IN_TRAINING = MemoryLimits()


class HeldTokens:
    """Keys and ids of a text's last whole chunks, of which the oldest leave when it is full, and of
    the chunk that is read now.

    Args:
        module: the memory's parameters.
        batch_size: rows.
        like: on whose device and in whose type keys are; those of whole chunks are in the type of
            ``limits``.
        limits: how much is held of whole chunks, and in which type.

    Raises:
        ConfigError: of :meth:`MemoryLimits.most_chunks`.
    """

    def __init__(
        self,
        module: TokenMemory,
        batch_size: int,
        like: Tensor,
        limits: MemoryLimits = AS_IN_TRAINING,
    ) -> None:
        size = module.chunk_size
        self._module, self.most_chunks = module, limits.most_chunks(module)
        dtype = like.dtype if limits.dtype is None else KEY_TYPES[limits.dtype]
        shape = (batch_size, module.pointers)
        ids = torch.full(
            (batch_size, size + 2), NOTHING_BEFORE, dtype=torch.int32, device=like.device
        )
        self._whole = Keys(like.new_empty(*shape, 0, module.dim, dtype=dtype), ids[:, :2].clone())
        self._means = mean_keys(self._whole.keys, size)
        self._current = Keys(like.new_empty(*shape, size, module.dim), ids)
        self._length = 0  # tokens of the current chunk
        self._in_whole: EarlierKeys | None = None  # not asked for yet behind the last whole chunk

    @property
    def earlier(self) -> Keys:
        """Of whole chunks, keys (B, H, J, D)."""
        return self._whole

    def begin_behind(self, before: Tensor) -> None:
        """Nothing is held yet, and the text goes on behind tokens (B,)."""
        self._whole.text[:, 0] = self._current.text[:, 0] = before

    @torch.no_grad()
    def append(self, states: Tensor, tokens: Tensor) -> None:
        """The next tokens (B, T) of the current chunk, and the encoder's states of them (B, T,
        C).
        """
        end = self._length + tokens.shape[1]
        keys, text = self._current
        keys[:, :, self._length : end] = self._module.keys(states)
        text[:, self._length + 1 : end + 1] = tokens
        self._whole.text[:, -1] = text[:, 1]
        self._length = end

    def finish_chunk(self) -> None:
        """The current chunk is whole, and held from now on."""
        keys, text = self._current
        if self._whole.keys.dtype == torch.int8:
            keys = (keys * 127).round()
        keys = keys.to(self._whole.keys.dtype)
        means = torch.cat([self._means, mean_keys(keys, self._module.chunk_size)], dim=2)
        self._means = means[:, :, max(means.shape[2] - self.most_chunks, 0) :]
        keys = torch.cat([self._whole.keys, keys], dim=2)
        whole = Keys(keys, torch.cat([self._whole.text[:, :-1], text[:, 1:]], dim=1))
        most = self.most_chunks * self._module.chunk_size
        self._whole = whole.cut(max(whole.num_keys - most, 0), whole.num_keys)
        text[:, 0] = text[:, -2]
        text[:, 1:] = NOTHING_BEFORE
        self._length, self._in_whole = 0, None

    def mix(self, newest: Tensor, hidden: Tensor, logits: Tensor) -> Tensor:
        """Log-probabilities (B, 1, V) of what is behind the newest token.

        Args:
            newest: (B, 1, C), the encoder's state.
            hidden: (B, 1, C), what the head reads.
            logits: (B, 1, V) of the head.
        """
        query = self._module.ask(newest, hidden)
        offsets = torch.full((1,), self._length - 1, device=logits.device)
        own = self._current.cut(0, self._length)
        if self._in_whole is None:
            self._in_whole = EarlierKeys.of(self._whole, self._module.scoring())
        known = self._means, self._in_whole
        return mixed(self._module, query, offsets, self._whole, own, logits, *known)

    def precise_keys(self) -> Tensor:
        """The keys (B, H, J, D) of whole chunks as numbers in at least fp32, whatever they are held
        in.
        """
        keys = self._whole.keys
        if keys.dtype == torch.int8:
            return keys.float() / 127
        return keys.to(torch.promote_types(keys.dtype, torch.float32))

    @property
    def num_tokens(self) -> int:
        """Tokens held of a row, of whole chunks."""
        return self._whole.num_keys

    def size(self, num_tokens: int | None = None) -> str:
        """How much of a row ``num_tokens`` are, for people; None: those held now."""
        tokens = self.num_tokens if num_tokens is None else num_tokens
        keys, text = self._whole
        key, chunk = keys.shape[1] * keys.shape[3], self._module.chunk_size
        each = key * (keys.itemsize + self._means.itemsize / chunk) + text.itemsize
        return f"{tokens:,} tokens in {tokens * each / 2**20:,.1f} MiB"
