"""Where the tokens and the chunk features come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Shards to train and validate on."""

    train: tuple[str, ...] = ()
    """Shard prefixes (or globs of them), as ``tools/preprocess.py`` prints them."""
    weights: tuple[float, ...] = ()
    """Share of each entry of ``train`` in the samples, in any unit. Empty: all are one corpus."""
    validation: tuple[str, ...] = ()
    """Shard prefixes evaluated whole. Empty: no evaluation."""
    vocabulary: str | None = None
    """Folder with GPT-2's ``encoder.json`` and ``vocab.bpe``; None: the installed ones."""
    features: str | None = None
    """Folder of EGPT's chunk-feature stores; None: next to the run's checkpoints."""
    history_features: Literal["stored", "online"] = "stored"
    """Earlier chunks' features: read from the store, or encoded again in the loop."""
    token_features: Literal["online", "stored"] = "online"
    """The current chunks' encoder states: encoded in the loop, or read (large: a vector each)."""
    feature_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Storage type of features; auto: the training precision."""
    prefetch: int = 2
    """Global batches prepared ahead by a background thread."""
