"""Small shards for the tests of everything above them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.stream import TokenStream


def write_shard(prefix: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> str:
    """A shard of these documents; its prefix."""
    with ShardWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    return str(prefix)


def counting_stream(folder: Path, tokens: int, shard_tokens: int | None = None) -> TokenStream:
    """Tokens 0, 1, 2, ... (int32, so that a token is its own position), cut into shards."""
    shard_tokens = shard_tokens or tokens
    prefixes = [
        write_shard(
            folder / f"count-{tokens}-{start}",
            [np.arange(start, min(start + shard_tokens, tokens))],
            np.int32,
        )
        for start in range(0, tokens, shard_tokens)
    ]
    return TokenStream(prefixes)
