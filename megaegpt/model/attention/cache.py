"""The preallocated key/value cache of incremental decoding, and the context that reads it.

Shapes: B batch, T new tokens, S cached tokens, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.model.attention.context import band_mask
from megaegpt.model.positions import RotaryTable
from megaegpt.parallel.grid import ProcessGrid


class KVCache:
    """Keys and values of all layers for up to ``capacity`` tokens; passed in, never kept on a
    module.
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
        heads = max(config.kv_heads // grid.tp_size, 1)
        shape = (config.num_layers, 2, batch_size, heads, capacity, config.head_size)
        self._store = torch.empty(shape, dtype=dtype, device=grid.device)
        self.capacity = capacity
        self.length = 0

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0

    def bytes(self) -> int:
        """Memory of this rank's cache."""
        return self._store.nbytes

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' (B, K, T, D) after the old ones; all so far, (B, K, S + T, D), without
        gradient: a cache is for inference.
        """
        end = self.length + k.shape[2]
        keys, values = self._store[layer, 0], self._store[layer, 1]
        with torch.no_grad():
            keys[:, :, self.length : end] = k
            values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class CachedContext:
    """New tokens after the cache's; the caller advances ``cache.length`` once all layers have
    run.
    """

    def __init__(self, cache: KVCache, new_tokens: int, rotary: RotaryTable | None = None) -> None:
        self.rotary = rotary
        self.cache = cache
        end = cache.length + new_tokens
        device = cache._store.device
        self._rows = torch.arange(cache.length, end, device=device)
        self._columns = torch.arange(end, device=device)

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
        k, v = self.cache.update(layer, k, v)
        grouped = q.shape[1] != k.shape[1]
        if q.shape[2] == 1 and window is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        mask = band_mask(self._rows, self._columns, window)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
