"""EGPT's attention layout: tokens of a chunk read the features of earlier chunks, and themselves.

In the original every token is decoded as the last of a short sequence [features of earlier
chunks..., token]. The features come before the token, so causal attention never lets them depend
on it: their stream is the same for all tokens and is run once a window. A training pass holds
[M memory vectors, then the window's tokens] as one sequence.

Shapes: B batch, N chunks, S chunk size, M memory vectors, T tokens, L local keys, H heads, K kv
heads, G = H / K, D head dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.model.attention.cache import KVCache
from megaegpt.model.attention.causal import OncePerPass, band_mask, scaled_dot_product
from megaegpt.model.attention.context import CausalContext
from megaegpt.model.attention.layer import AttentionLayer
from megaegpt.model.rotary import RotaryTable
from megaegpt.parallel.context_shards import ContextShards
from megaegpt.parallel.sequence import SequenceShards

Gates = Sequence[Tensor]
"""Each layer's memory gate, (H,) for this rank's heads; none at all in a model without gates."""


def _gate_of(gates: Gates, layer: AttentionLayer) -> Tensor | None:
    return gates[layer.index] if gates else None


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


class ChunkWindowContext:
    """A training window: features of chunks from the first on, then chunks of tokens.

    Args:
        chunks: (N,) numbers of the chunks of tokens.
        memory_size: features, one of each of the first chunks.
        local: tokens of a chunk also attend to each other.
        rotary: rotations of features and tokens.
        gates: open the tokens' way to the memory.
        shards: of features and tokens.
    """

    absorbed = False
    context_shards: ContextShards | None = None

    def __init__(
        self,
        chunks: Tensor,
        chunk_size: int,
        memory_size: int,
        *,
        local: bool,
        rotary: RotaryTable | None,
        gates: Gates,
        shards: SequenceShards | None,
    ) -> None:
        self.rotary, self.shards = rotary, shards
        self.local = local
        self.num_chunks, self.chunk_size = len(chunks), chunk_size
        self.memory_size = memory_size
        self._token_chunk = chunks
        self._slot = torch.arange(memory_size, device=chunks.device)  # (M,)
        self._gates = gates
        self._masks = OncePerPass()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """q (B, H, T, D), k and v (B, K, T, D) with T = M + N * S -> (B, H, T, Dv)."""
        sizes = [self.memory_size, self.num_chunks * self.chunk_size]
        memory_q, token_q = q.split(sizes, dim=2)
        memory_k, token_k = k.split(sizes, dim=2)
        memory_v, token_v = v.split(sizes, dim=2)
        of_memory = self._memory_stream(memory_q, memory_k, memory_v, layer)
        read = self._tokens_with_local if self.local else self._tokens_alone
        of_tokens = read(token_q, token_k, token_v, (memory_k, memory_v), layer)
        return torch.cat([of_memory, of_tokens], dim=2)

    def _memory_stream(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        """The features among themselves: causal, in the window."""
        if self.memory_size == 0:
            return v.new_zeros((*q.shape[:3], v.shape[-1]))

        def make() -> Tensor:  # (M, M)
            return band_mask(self._slot, self._slot, layer.window)

        mask = self._masks.get(("memory", layer.window), make)
        return scaled_dot_product(q, k, v, mask, dropout=layer.dropout)

    def _tokens_alone(
        self, q: Tensor, k: Tensor, v: Tensor, memory: tuple[Tensor, Tensor], layer: AttentionLayer
    ) -> Tensor:
        """Every token reads the memory and itself: (B, H, N * S, D) -> (B, H, N * S, Dv)."""

        def make() -> Tensor:  # (1, N * S, M)
            visible = self._visible(layer.window, 1)  # (1, N, 1, M)
            return visible.expand(-1, -1, self.chunk_size, -1).flatten(1, 2)

        visible = self._masks.get(("tokens", layer.window), make)
        gate = _gate_of(self._gates, layer)
        return _read(q, k, v, Memory(*memory, visible), None, layer.dropout, gate)

    def _visible(self, window: int | None, rows: int) -> Tensor:
        """(1, N, rows, M): memory seen by the first ``rows`` tokens of each chunk.

        A token at offset t of chunk n has place n + t in its own sequence [features..., tokens
        of the chunk]; without local attention every token is its first.
        """
        earlier = self._slot < self._token_chunk.unsqueeze(1)  # (N, M)
        visible = earlier.unsqueeze(1).expand(-1, rows, -1).unsqueeze(0)  # (1, N, rows, M)
        if window is not None:
            offsets = torch.arange(rows, device=self._slot.device)
            place = self._token_chunk.unsqueeze(1) + offsets
            visible = visible & (place.unsqueeze(-1) - self._slot < window)
        return visible

    def _tokens_with_local(
        self, q: Tensor, k: Tensor, v: Tensor, memory: tuple[Tensor, Tensor], layer: AttentionLayer
    ) -> Tensor:
        """Every chunk as a row of its own batch: (B, H, N * S, D) -> (B, H, N * S, Dv)."""
        batch, chunks, size = q.shape[0], self.num_chunks, self.chunk_size

        def by_chunk(x: Tensor) -> Tensor:  # (B, h, N * S, d) -> (B * N, h, S, d)
            return x.unflatten(2, (chunks, size)).transpose(1, 2).flatten(0, 1)

        def make() -> tuple[Tensor, Tensor]:  # (B * N, S, M) and (S, S)
            visible = self._visible(layer.window, size).expand(batch, -1, -1, -1).flatten(0, 1)
            offsets = torch.arange(size, device=q.device)
            return visible, band_mask(offsets, offsets, layer.window)

        visible, local = self._masks.get(("local", layer.window), make)
        keys, values = (x.repeat_interleave(chunks, dim=0) for x in memory)
        y = _read(
            by_chunk(q),
            by_chunk(k),
            by_chunk(v),
            Memory(keys, values, visible),
            local,
            layer.dropout,
            _gate_of(self._gates, layer),
        )
        return y.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)


class RecordingContext(CausalContext):
    """The memory stream by itself, keeping each layer's keys and values for later reading."""

    absorbed = True

    def __init__(self, rotary: RotaryTable | None = None) -> None:
        super().__init__(rotary)
        self.recorded: list[tuple[Tensor, Tensor]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        self.recorded.append((k, v))
        return super().attend(q, k, v, layer)


class ReadingContext:
    """New tokens of one chunk during generation, with a recorded memory.

    Args:
        recorded: each layer's keys and values of the memory.
        cache: the chunk's tokens so far (local attention only; the caller advances it).
        rotary: rotations of the new tokens.
        gates: open their way to the memory.
    """

    absorbed = True
    shards: SequenceShards | None = None
    context_shards: ContextShards | None = None

    def __init__(
        self,
        recorded: list[tuple[Tensor, Tensor]],
        cache: KVCache | None,
        rotary: RotaryTable | None,
        gates: Gates,
    ) -> None:
        self.rotary = rotary
        self._recorded, self._cache, self._gates = recorded, cache, gates
        self._masks = OncePerPass()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        memory_k, memory_v = self._recorded[layer.index]
        size, length, device = memory_k.shape[2], q.shape[2], q.device
        cache = self._cache
        if cache is not None:
            k, v = cache.update(layer.index, k, v)

        def make() -> tuple[Tensor, Tensor | None]:  # (1, T, M) and (T, L)
            slots, local = torch.arange(size, device=device), None
            if cache is None:  # every token stands directly behind the memory
                rows = torch.full((length,), size, device=device)
            else:
                offsets = torch.arange(cache.length, cache.length + length, device=device)
                rows = size + offsets
                local = band_mask(offsets, cache.columns(layer.index, length), layer.window)
            return band_mask(rows, slots, layer.window).unsqueeze(0), local

        visible, local = self._masks.get(layer.window, make)
        memory = Memory(memory_k, memory_v, visible)
        return _read(q, k, v, memory, local, layer.dropout, _gate_of(self._gates, layer))
