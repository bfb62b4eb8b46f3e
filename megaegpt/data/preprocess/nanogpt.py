"""Import of nanoGPT's token files: raw little-endian uint16 GPT-2 ids, no header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaegpt.data.tokenizer import END_OF_TEXT_ID, Tokenizer
from megaegpt.data.tokens.corpus_manifest import Manifest, describe_tokenizer
from megaegpt.data.tokens.memory_map import map_bytes
from megaegpt.data.tokens.shards import ShardSummary, ShardWriter, bin_path
from megaegpt.errors import DataError
from megaegpt.files import naming_failures

_BLOCK = 1 << 22  # tokens


def import_files(files: Sequence[Path], output: Path) -> Manifest:
    """Import token files into one folder of shards; ``train.bin`` becomes the split ``train``,
    ``val.bin`` the split ``validation``.

    Raises:
        DataError: a file is not a token file, or a shard would take its place.
    """
    with naming_failures(output):
        output.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[ShardSummary]] = {}
    for file in files:
        if file.suffix != ".bin" or not file.is_file():
            raise DataError(f"{file} is not a token file such as train.bin or val.bin")
        split = "validation" if file.stem == "val" else file.stem
        if bin_path(output / split).resolve() == file.resolve():
            raise DataError(f"{file} would be overwritten: choose another --output")
        splits[split] = [import_tokens(file, output / split)]
    shards = [shard for split in splits.values() for shard in split]
    counts = {
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
    }
    plan = {"from_nanogpt": [str(file) for file in files]}
    manifest = Manifest(describe_tokenizer(Tokenizer.load()), plan, counts, splits)
    manifest.save(output)
    return manifest


def import_tokens(file: Path, prefix: Path) -> ShardSummary:
    """Write a token file as a shard; every end-of-text token ends a document.

    Raises:
        DataError: the file is empty, is cut inside a token, or holds ids that are not GPT-2's.
    """
    content = map_bytes(file)
    if not len(content) or len(content) % 2:
        raise DataError(f"{file} has {len(content)} bytes: it is not a row of uint16 tokens")
    tokens = content.view("<u2")
    ends = _document_ends(tokens, file)
    lengths = np.diff(ends, prepend=0)
    with ShardWriter(prefix) as writer:
        first = 0
        while first < len(ends):  # as many whole documents at a time as fit a block, at least one
            start = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + _BLOCK, side="right")))
            writer.add(tokens[start : int(ends[last - 1])], lengths[first:last])
            first = last
        return writer.finish()


def _document_ends(tokens: np.ndarray, file: Path) -> np.ndarray:
    """Number of tokens up to the end of each document."""
    ends = []
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        if block.max() > END_OF_TEXT_ID:
            raise DataError(
                f"{file} holds id {block.max()} after token {start:,}: these are not GPT-2 tokens"
            )
        ends.append(np.flatnonzero(block == END_OF_TEXT_ID) + start + 1)
    found = np.concatenate(ends)
    if not len(found) or found[-1] != len(tokens):
        found = np.append(found, len(tokens))
    return found
