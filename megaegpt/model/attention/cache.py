"""The preallocated key/value cache of incremental decoding, and the context that reads it.

Bytes of one layer's store, on one rank, with e bytes a number:

- full: ``2 * B * K * capacity * D * e``
- sliding window (ring): ``2 * B * K * min(window, capacity) * D * e``
- latent: ``B * capacity * (latent_dim + rope_head_dim) * e``, on every TP rank alike

K = num_kv_heads / tp, at least 1. Rows with padding or several texts add 8 bytes a token for the
whole cache.

Shapes: B batch, T new tokens, S tokens given to the queries, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.errors import ConfigError
from megaegpt.model.attention.causal import OncePerPass, Segments, causal_attention
from megaegpt.model.attention.layer import AttentionLayer, layer_window
from megaegpt.model.rotary import RotaryTable
from megaegpt.parallel.context_shards import ContextShards
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.sequence import SequenceShards


class LayerStore(Protocol):
    """One layer's keys and values. A column is a token's number in its row, padding counted."""

    def append(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep (B, K, T, D) of columns ``start ...``; all that the new tokens may see, (B, K, S,
        D): in order, or, for a single new token, in any order.
        """
        ...

    def columns(self, start: int, length: int) -> Tensor:
        """(S,) columns of what ``append`` returns for ``length`` tokens from ``start`` on."""
        ...

    def first_rows(self, count: int) -> LayerStore:
        """A store of the first ``count`` rows, in the same memory."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they lie, (B, K, S, D): column c is at place c mod S. One tensor twice
        where the values are in the keys.
        """
        ...


class FullStore:
    """Every column, at its own place. Without ``values`` the keys are the values too: latents with
    the shared rotary key beside them.
    """

    def __init__(self, keys: Tensor, values: Tensor | None = None) -> None:
        """(B, K, capacity, D) each"""
        self._keys, self._values = keys, keys if values is None else values
        self.nbytes = keys.nbytes + (0 if values is None else values.nbytes)

    def append(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = start + k.shape[2]
        self._keys[:, :, start:end] = k
        if self._values is not self._keys:
            self._values[:, :, start:end] = v
        return self._keys[:, :, :end], self._values[:, :, :end]

    def columns(self, start: int, length: int) -> Tensor:
        return torch.arange(start + length, device=self._keys.device)

    def first_rows(self, count: int) -> FullStore:
        own_values = None if self._values is self._keys else self._values[:count]
        return FullStore(self._keys[:count], own_values)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._keys, self._values


class RingStore:
    """The last ``window`` columns: column c is at place c mod window."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """(B, K, window, D) each"""
        self._keys, self._values = keys, values
        self._size = keys.shape[2]
        self.nbytes = keys.nbytes + values.nbytes

    def append(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._append(self._keys, start, k), self._append(self._values, start, v)

    def _append(self, ring: Tensor, start: int, new: Tensor) -> Tensor:
        length = new.shape[2]
        if length == 1:  # the ring as it lies: the new token takes the place of the one that leaves
            ring[:, :, start % self._size] = new[:, :, 0]
            return ring[:, :, : start + 1]
        new = new.to(ring.dtype)
        seen = torch.cat([ring[:, :, self._old_columns(start) % self._size], new], dim=2)
        first = start + max(length - self._size, 0)
        places = torch.arange(first, start + length, device=ring.device) % self._size
        ring[:, :, places] = new[:, :, first - start :]
        return seen

    def columns(self, start: int, length: int) -> Tensor:
        if length > 1:
            new = torch.arange(start, start + length, device=self._keys.device)
            return torch.cat([self._old_columns(start), new])
        places = torch.arange(min(start + 1, self._size), device=self._keys.device)
        return start - (start - places) % self._size

    def first_rows(self, count: int) -> RingStore:
        return RingStore(self._keys[:count], self._values[:count])

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._keys, self._values

    def _old_columns(self, start: int) -> Tensor:
        return torch.arange(max(start - self._size, 0), start, device=self._keys.device)


class KVCache:
    """Keys and values of all layers for up to ``capacity`` tokens a row; passed in, never kept on
    a module, and for inference: no gradient flows into it.

    Rows of different lengths are padded on the left (``segments`` of ``GPT.hidden_states``).

    Args:
        config: of the model.
        grid: the cache lies on its device and holds this rank's heads.
        batch_size: rows.
        capacity: tokens a row, padding counted.
        dtype: of keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        grid: ProcessGrid,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.length = 0
        self.segments: Tensor | None = None
        """(B, capacity + 1), up to the column that comes next; None: each row is one text."""
        self._device = grid.device
        self._layers = [
            _layer_store(config, layer, grid, batch_size, capacity, dtype)
            for layer in range(config.num_layers)
        ]

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0
        self.segments = None

    def first_rows(self, count: int) -> KVCache:
        """A cache of the first ``count`` rows in the same memory, ``segments`` as they are now
        included; its length is its own from then on.
        """
        view = copy.copy(self)
        view.batch_size = count
        view.segments = None if self.segments is None else self.segments[:count]
        view._layers = [layer.first_rows(count) for layer in self._layers]
        return view

    def bytes(self) -> int:
        """Memory of this rank's keys and values; see the formulas of this module."""
        return sum(layer.nbytes for layer in self._layers)

    def stores(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values, see :attr:`LayerStore.tensors`."""
        return [layer.tensors for layer in self._layers]

    @torch.no_grad()
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' (B, K, T, D) after the old ones; all that they may see, (B, K, S,
        D). For a single token the order is free, else it is the tokens' own.

        Raises:
            ConfigError: there is no room for them.
        """
        if k.shape[0] != self.batch_size:
            raise ValueError(f"{k.shape[0]} rows for a cache of {self.batch_size}")
        if self.length + k.shape[2] > self.capacity:
            raise ConfigError(
                f"the key/value cache holds {self.capacity} tokens: {self.length} are in it and "
                f"{k.shape[2]} more do not fit; make it larger or the text shorter"
            )
        return self._layers[layer].append(self.length, k, v)

    def columns(self, layer: int, length: int) -> Tensor:
        """(S,) columns of what :meth:`update` returns for ``length`` new tokens."""
        return self._layers[layer].columns(self.length, length)

    def next_segment(self) -> tuple[Tensor, Tensor]:
        """The segment (B,) that the next token continues, and how many tokens it has so far."""
        if self.segments is None:
            segment = torch.zeros(self.batch_size, dtype=torch.int64, device=self._device)
            return segment, segment + self.length
        segment = self.segments[:, self.length]
        count = (self.segments[:, : self.length] == segment.unsqueeze(1)).sum(1)
        return segment, count

    def keep_segments(self, segments: Tensor, following: Tensor) -> None:
        """Note the new tokens' (B, T) segments, and the one (B,) that a token after them is in."""
        if self.segments is None:
            shape = (self.batch_size, self.capacity + 1)
            self.segments = torch.zeros(shape, dtype=torch.int64, device=self._device)
        end = self.length + segments.shape[1]
        if end <= self.capacity:  # else update() refuses the tokens
            self.segments[:, self.length : end] = segments
            self.segments[:, end] = following


def _layer_store(
    config: ModelConfig,
    layer: int,
    grid: ProcessGrid,
    batch_size: int,
    capacity: int,
    dtype: torch.dtype,
) -> LayerStore:
    """The store that fits a layer's attention kind and window."""

    def room(heads: int, size: int, width: int) -> Tensor:
        return torch.empty(batch_size, heads, size, width, dtype=dtype, device=grid.device)

    if config.attention == "latent":
        return FullStore(room(1, capacity, config.latent_size + (config.rope_head_dim or 0)))
    heads = max(config.kv_heads // grid.tp_size, 1)
    window = layer_window(config, layer)
    size = capacity if window is None else min(window, capacity)
    keys, values = (room(heads, size, config.head_size) for _ in range(2))
    return FullStore(keys, values) if size == capacity else RingStore(keys, values)


class CachedContext:
    """New tokens after the cache's; the caller advances ``cache.length`` once all layers have
    run.

    Args:
        cache: what came before; its segments, if it has any, include the new tokens' already.
        new_tokens: how many are given now.
        rotary: their rotations.
    """

    absorbed = True
    shards: SequenceShards | None = None
    context_shards: ContextShards | None = None

    def __init__(self, cache: KVCache, new_tokens: int, rotary: RotaryTable | None = None) -> None:
        self.rotary = rotary
        self.cache = cache
        self._new_tokens = new_tokens
        self._masks = OncePerPass()

    def _segments(self, layer: AttentionLayer) -> Segments | None:
        known, start = self.cache.segments, self.cache.length
        if known is None:
            return None
        columns = self.cache.columns(layer.index, self._new_tokens)
        return Segments(known[:, start : start + self._new_tokens], known[:, columns])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        k, v = self.cache.update(layer.index, k, v)
        segments = self._masks.get(("segments", layer.window), lambda: self._segments(layer))
        return causal_attention(q, k, v, window=layer.window, segments=segments, masks=self._masks)
