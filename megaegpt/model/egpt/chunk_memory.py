"""EGPT's attention layout: tokens of a chunk read the features of earlier chunks, and themselves.

In the original every token is decoded as the last of a short sequence [features of earlier
chunks..., token]. The features come before the token, so causal attention never lets them depend
on it: their stream is the same for all tokens and is run once a window. A training pass holds
[M memory vectors, then the window's tokens] as one sequence.

Shapes: B batch, N chunks, S chunk size, P features a chunk, M memory vectors, T tokens, L local
keys, H heads, K kv heads, G = H / K, D head dim, Dv value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.model.attention.cache import KVCache
from megaegpt.model.attention.causal import band_mask, scaled_dot_product
from megaegpt.model.attention.context import CausalContext
from megaegpt.model.positions import RotaryTable


class Memory(NamedTuple):
    """One layer's view of the earlier chunks."""

    keys: Tensor
    """(B, K, M, D)"""
    values: Tensor
    """(B, K, M, Dv)"""
    visible: Tensor
    """(B or 1, T, M): which vectors each query sees."""


def _scores(q: Tensor, memory: Memory) -> Tensor:
    """Scaled scores of q (B, H, T, D) against the memory, (B, K, G, T, M), in at least fp32."""
    batch, _, length, dim = q.shape
    q = q.reshape(batch, memory.keys.shape[1], -1, length, dim) * dim**-0.5  # (B, K, G, T, D)
    scores = q @ memory.keys.unsqueeze(2).transpose(-1, -2)  # (B, K, G, T, M)
    precise = torch.promote_types(q.dtype, torch.float32)
    return scores.to(precise).masked_fill(~memory.visible[:, None, None], -torch.inf)


def read_memory(q: Tensor, memory: Memory, dropout: float) -> Tensor:
    """Attention to the memory alone, (B, H, T, D) -> (B, H, T, Dv); 0 where nothing is visible."""
    if memory.keys.shape[2] == 0:
        return q.new_zeros((*q.shape[:3], memory.values.shape[-1]))
    scores = _scores(q, memory)
    nothing = ~memory.visible.any(-1)[:, None, None, :, None]
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    weights = F.dropout(weights.to(q.dtype), dropout)
    return (weights @ memory.values.unsqueeze(2)).reshape(*q.shape[:3], -1)


def read_memory_and_self(q: Tensor, k: Tensor, v: Tensor, memory: Memory, dropout: float) -> Tensor:
    """Each token attends to the visible memory and to itself: (B, H, T, D) -> (B, H, T, Dv)."""
    batch, _, length, dim = q.shape
    to_memory = _scores(q, memory)  # (B, K, G, T, M)
    grouped = q.reshape(batch, k.shape[1], -1, length, dim)
    to_self = (grouped * k.unsqueeze(2)).sum(-1, keepdim=True) * dim**-0.5  # (B, K, G, T, 1)
    scores = torch.cat([to_memory, to_self.to(to_memory.dtype)], dim=-1)
    weights = F.dropout(scores.softmax(-1).to(q.dtype), dropout)  # (B, K, G, T, M + 1)
    y = weights[..., :-1] @ memory.values.unsqueeze(2) + weights[..., -1:] * v.unsqueeze(2)
    return y.reshape(*q.shape[:3], -1)


def read_memory_and_local(
    q: Tensor, k: Tensor, v: Tensor, memory: Memory, local: Tensor, dropout: float
) -> Tensor:
    """Each token attends to the visible memory and to its chunk's tokens (B, K, L, D) by ``local``
    (T, L): (B, H, T, D) -> (B, H, T, Dv).
    """
    visible = memory.visible
    mask = torch.cat([visible, local.expand(visible.shape[0], -1, -1)], dim=-1)
    keys, values = torch.cat([memory.keys, k], dim=2), torch.cat([memory.values, v], dim=2)
    return scaled_dot_product(q, keys, values, mask.unsqueeze(1), dropout=dropout)


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Memory,
    local: Tensor | None,
    dropout: float,
    gate: Tensor | None,
) -> Tensor:
    """Read the memory and the chunk itself (``local``: its tokens, else the token alone).

    A gate (H,) reads the two apart and adds ``tanh(gate)`` of the memory to the rest, so that at
    gate 0 the model is the one without memory.
    """
    if gate is None:
        if local is None:
            return read_memory_and_self(q, k, v, memory, dropout)
        return read_memory_and_local(q, k, v, memory, local, dropout)
    if local is None:
        own = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    else:
        own = scaled_dot_product(q, k, v, local, dropout=dropout)
    return own + gate.tanh().view(-1, 1, 1) * read_memory(q, memory, dropout)


def on_one_side(chunks: Tensor, others: Tensor, cut: Tensor) -> Tensor:
    """Which of chunks (Q,) and others (M,) are on the same side of a row's cut (B,): (B, Q, M)."""
    after, others_after = (x >= cut.unsqueeze(1) for x in (chunks, others))
    return after.unsqueeze(2) == others_after.unsqueeze(1)


class ChunkWindowContext:
    """A training window: ``memory_size`` features, then ``num_chunks`` chunks of tokens.

    Args:
        num_chunks: chunks of tokens; the memory holds the features of all but the last.
        features_per_chunk: memory vectors of a chunk; 0 without a memory.
        local: tokens of a chunk also attend to each other.
        cut: (B,) or None; the history of chunks from this one on starts at it.
    """

    keeps_keys = False

    def __init__(
        self,
        num_chunks: int,
        chunk_size: int,
        features_per_chunk: int,
        *,
        local: bool,
        rotary: RotaryTable | None,
        cut: Tensor | None,
        device: torch.device,
    ) -> None:
        self.rotary = rotary
        self.local = local
        self.num_chunks, self.chunk_size = num_chunks, chunk_size
        self.memory_size = (num_chunks - 1) * features_per_chunk
        self._token_chunk = torch.arange(num_chunks, device=device)  # (N,)
        self._slot = torch.arange(self.memory_size, device=device)  # (M,)
        self._slot_chunk = self._slot // max(features_per_chunk, 1)
        self._features_per_chunk = features_per_chunk
        self._cut = cut

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        window: int | None,
        dropout: float,
        gate: Tensor | None,
    ) -> Tensor:
        """See :class:`~megaegpt.model.attention.context.AttentionContext`; T = M + N * S."""
        sizes = [self.memory_size, self.num_chunks * self.chunk_size]
        memory_q, token_q = q.split(sizes, dim=2)
        memory_k, token_k = k.split(sizes, dim=2)
        memory_v, token_v = v.split(sizes, dim=2)
        of_memory = self._memory_stream(memory_q, memory_k, memory_v, window, dropout)
        if self.local:
            of_tokens = self._tokens_with_local(
                token_q, token_k, token_v, memory_k, memory_v, window, dropout, gate
            )
        else:
            visible = self._visible(window, 1)  # (B or 1, N, 1, M)
            visible = visible.expand(-1, -1, self.chunk_size, -1).flatten(1, 2)
            memory = Memory(memory_k, memory_v, visible)
            of_tokens = _read(token_q, token_k, token_v, memory, None, dropout, gate)
        return torch.cat([of_memory, of_tokens], dim=2)

    def _memory_stream(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout: float
    ) -> Tensor:
        """The features among themselves: causal, in the window, not across a cut."""
        if self.memory_size == 0:
            return v.new_zeros((*q.shape[:3], v.shape[-1]))
        mask = band_mask(self._slot, self._slot, window).unsqueeze(0)
        if self._cut is not None:
            mask = mask & on_one_side(self._slot_chunk, self._slot_chunk, self._cut)
        return scaled_dot_product(q, k, v, mask.unsqueeze(1), dropout=dropout)

    def _visible(self, window: int | None, rows: int) -> Tensor:
        """(B or 1, N, rows, M): memory seen by the first ``rows`` tokens of each chunk.

        A token at offset t of chunk n has place n * P + t in its own sequence [features..., tokens
        of the chunk]; without local attention every token is its first.
        """
        earlier = self._slot_chunk < self._token_chunk.unsqueeze(1)  # (N, M)
        visible = earlier.unsqueeze(1).expand(-1, rows, -1).unsqueeze(0)  # (1, N, rows, M)
        if window is not None:
            offsets = torch.arange(rows, device=self._slot.device)
            place = self._token_chunk.unsqueeze(1) * self._features_per_chunk + offsets
            visible = visible & (place.unsqueeze(-1) - self._slot < window)
        if self._cut is not None:
            together = on_one_side(self._token_chunk, self._slot_chunk, self._cut)  # (B, N, M)
            visible = visible & together.unsqueeze(2)
        return visible

    def _tokens_with_local(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_k: Tensor,
        memory_v: Tensor,
        window: int | None,
        dropout: float,
        gate: Tensor | None,
    ) -> Tensor:
        """Every chunk as a row of its own batch: (B, H, N * S, D) -> (B, H, N * S, Dv)."""
        batch, chunks, size = q.shape[0], self.num_chunks, self.chunk_size

        def by_chunk(x: Tensor) -> Tensor:  # (B, h, N * S, d) -> (B * N, h, S, d)
            return x.unflatten(2, (chunks, size)).transpose(1, 2).flatten(0, 1)

        visible = self._visible(window, size).expand(batch, -1, -1, -1).flatten(0, 1)
        memory = Memory(
            memory_k.repeat_interleave(chunks, dim=0),
            memory_v.repeat_interleave(chunks, dim=0),
            visible,  # (B * N, S, M)
        )
        offsets = torch.arange(size, device=q.device)
        local = band_mask(offsets, offsets, window)
        y = _read(by_chunk(q), by_chunk(k), by_chunk(v), memory, local, dropout, gate)
        return y.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)


class RecordingContext(CausalContext):
    """The memory stream by itself, keeping each layer's keys and values for later reading."""

    keeps_keys = True

    def __init__(self, rotary: RotaryTable | None = None) -> None:
        super().__init__(rotary)
        self.recorded: list[tuple[Tensor, Tensor]] = []

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        window: int | None,
        dropout: float,
        gate: Tensor | None,
    ) -> Tensor:
        """See :class:`~megaegpt.model.attention.context.AttentionContext`."""
        self.recorded.append((k, v))
        return super().attend(q, k, v, layer=layer, window=window, dropout=dropout, gate=gate)


class ReadingContext:
    """New tokens of one chunk during generation, with a recorded memory.

    Args:
        recorded: each layer's keys and values of the memory.
        cache: the chunk's tokens so far (local attention only; the caller advances it).
    """

    keeps_keys = True

    def __init__(
        self,
        recorded: list[tuple[Tensor, Tensor]],
        cache: KVCache | None,
        rotary: RotaryTable | None = None,
    ) -> None:
        self.rotary = rotary
        self._recorded = recorded
        self._cache = cache

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        window: int | None,
        dropout: float,
        gate: Tensor | None,
    ) -> Tensor:
        """See :class:`~megaegpt.model.attention.context.AttentionContext`."""
        memory_k, memory_v = self._recorded[layer]
        size, length = memory_k.shape[2], q.shape[2]
        start = 0 if self._cache is None else self._cache.length
        slots = torch.arange(size, device=q.device)
        if self._cache is None:  # every token stands directly behind the memory
            rows = torch.full((length,), size, device=q.device)
            local = None
        else:
            k, v = self._cache.update(layer, k, v)
            offsets = torch.arange(start, start + length, device=q.device)
            rows = size + offsets
            local = band_mask(offsets, self._cache.columns(layer, length), window)
        memory = Memory(memory_k, memory_v, band_mask(rows, slots, window).unsqueeze(0))
        return _read(q, k, v, memory, local, dropout, gate)
