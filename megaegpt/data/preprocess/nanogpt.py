"""Import of nanoGPT's token files: raw little-endian uint16 GPT-2 ids, no header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megaegpt.data.preprocess.progress import Progress
from megaegpt.data.tokenizer import END_OF_TEXT_ID, Tokenizer
from megaegpt.data.tokens.corpus_manifest import Manifest, describe_tokenizer
from megaegpt.data.tokens.memory_map import map_bytes
from megaegpt.data.tokens.shard_tokenizer import check_tokenizer_place, save_beside_shards
from megaegpt.data.tokens.shards import ShardSummary, ShardWriter, bin_path
from megaegpt.errors import DataError
from megaegpt.files import (
    LFS_POINTER,
    LFS_POINTER_MESSAGE,
    is_same_file,
    locked_folder,
    made_folder,
)

BLOCK_TOKENS = 1 << 22
"""Tokens that are imported at a time."""

_ENOUGH_TO_TELL = 64  # tokens; id 0 is "!", which no text has at every other place


def import_files(files: Sequence[Path], output: Path, overwrite: bool = False) -> Manifest:
    """Import token files into one folder of shards; ``train.bin`` becomes the split ``train``,
    ``val.bin`` the split ``validation``. Shards of the same files are left as they are.

    Args:
        files: one of each split.
        output: folder of the shards.
        overwrite: replace shards of other inputs.

    Raises:
        DataError: a file is not a token file, two are of one split, a shard would take a file's
            place or another shard's, or the folder is in use.
    """
    files_of_splits = _by_split(files, output)
    with made_folder(output), locked_folder(output):
        plan = {"from_nanogpt": [_identify(file) for file in files]}
        tokenizer = Tokenizer.load()
        check_tokenizer_place(tokenizer, output)
        progress = Progress(output, plan, list(files_of_splits), overwrite, tokenizer)
        if progress.complete is not None:
            return progress.complete
        try:
            sources = {split: _read(file) for split, file in files_of_splits.items()}
            splits = {
                split: [_write(*read, output / split, progress)] for split, read in sources.items()
            }
        except BaseException:
            progress.abandon()
            raise
        shards = [shard for split in splits.values() for shard in split]
        counts = {
            "documents": sum(shard.documents for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
        }
        manifest = Manifest(describe_tokenizer(tokenizer), progress.plan, counts, splits)
        save_beside_shards(tokenizer, output)
        progress.finish(manifest)
        return manifest


def _by_split(files: Sequence[Path], output: Path) -> dict[str, Path]:
    """The token file of each split."""
    found: dict[str, Path] = {}
    for file in files:
        if file.suffix != ".bin" or not file.is_file():
            raise DataError(f"{file} is not a token file such as train.bin or val.bin")
        split = "validation" if file.stem == "val" else file.stem
        if split in found:
            raise DataError(
                f"{found[split]} and {file} would both be the split {split}: import them into two "
                "folders, and give both prefixes as data.train"
            )
        if is_same_file(bin_path(output / split), file):
            raise DataError(f"{file} would be overwritten: choose another --output")
        found[split] = file
    return found


def _identify(file: Path) -> dict[str, str | int]:
    """By what a changed file is told."""
    state = file.stat()
    return {"path": str(file), "size": state.st_size, "mtime_ns": state.st_mtime_ns}


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a file, and how many there are up to the end of each document: every
    end-of-text token ends one.

    Raises:
        DataError: the file is empty, is cut inside a token, or holds ids that are not GPT-2's.
    """
    content = map_bytes(file)
    if content[: len(LFS_POINTER)].tobytes() == LFS_POINTER:
        raise DataError(f"{file}: {LFS_POINTER_MESSAGE}")
    if not len(content) or len(content) % 2:
        raise DataError(f"{file} has {len(content)} bytes: it is not a row of uint16 tokens")
    tokens = content.view("<u2")
    if len(tokens) >= _ENOUGH_TO_TELL and not tokens[1:BLOCK_TOKENS:2].any():
        raise DataError(f"{file} holds ids of 4 bytes: nanoGPT's tokens have 2")
    return tokens, _document_ends(tokens, file)


def _write(tokens: np.ndarray, ends: np.ndarray, prefix: Path, progress: Progress) -> ShardSummary:
    lengths = np.diff(ends, prepend=0)
    with ShardWriter(prefix) as writer:
        first = 0
        while first < len(ends):  # as many whole documents at a time as fit a block, at least one
            start = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + BLOCK_TOKENS, side="right")))
            writer.add(tokens[start : int(ends[last - 1])], lengths[first:last])
            first = last
        return writer.finish(progress.replace_complete)


def _document_ends(tokens: np.ndarray, file: Path) -> np.ndarray:
    """Number of tokens up to the end of each document."""
    ends = []
    for start in range(0, len(tokens), BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS]
        if block.max() > END_OF_TEXT_ID:
            raise DataError(
                f"{file} holds id {block.max()} after token {start:,}: these are not GPT-2 tokens"
            )
        ends.append(np.flatnonzero(block == END_OF_TEXT_ID) + start + 1)
    found = np.concatenate(ends)
    if not len(found) or found[-1] != len(tokens):
        found = np.append(found, len(tokens))
    return found
