"""The key/value caches of texts that are being written."""

from __future__ import annotations

from megaegpt.errors import ConfigError
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import Model


def new_cache(model: Model, batch_size: int, capacity: int) -> KVCache:
    """An empty cache in the type and on the device of ``model``, for ``capacity`` tokens a row.

    Raises:
        ConfigError: it does not fit into memory.
    """
    dtype = model.head.weight.dtype
    try:
        return KVCache(model.config, model.grid, batch_size, capacity, dtype=dtype)
    except RuntimeError as error:  # torch's allocators raise this, on a GPU a subclass of it
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the keys and values of {batch_size:,} texts of up to {capacity:,} tokens do not fit "
            f"into memory: write fewer or shorter texts at once ({reason})"
        ) from None
