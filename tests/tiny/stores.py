"""Feature stores of any encoder."""

from __future__ import annotations

from typing import Any

from megaegpt.data.features.contents import EncodedChunks
from megaegpt.data.features.store import FeatureStore
from megaegpt.data.features.writer import compute_store


def compute_features(
    folder: Any,
    spec: Any,
    stream: Any,
    encode: Any,
    grid: Any,
    batch_size: int,
    title: str = "features",
) -> FeatureStore:
    contents = EncodedChunks(spec, stream, encode)
    return compute_store(folder, spec, contents, grid, batch_size, title)
