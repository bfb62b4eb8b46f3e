"""Shards against the vocabulary of the model that is to read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.corpus_manifest import MANIFEST_NAME, Manifest
from megaegpt.data.tokens.shards import Shard
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import ConfigError, DataError

MAX_SCANNED_BYTES = 4 << 30
"""Bytes of tokens that are read at the start of a run; more would take longer than it should."""


def check_ids(stream: TokenStream, vocab_size: int, rank: int = 0, world_size: int = 1) -> None:
    """Make sure that no token outside the vocabulary gets out of a stream.

    A shard whose manifest names a tokenizer of at most ``vocab_size`` ids is taken at its word (its
    checksum vouches for it), and so is a type that can hold no more. The others are read, up to 4
    GiB of them, shared by the ranks; of more than that, each token is looked at as it is read.

    Args:
        stream: the shards.
        vocab_size: ids that the model knows.

    Raises:
        DataError: names file, position and id of the first token that is outside; or a manifest is
            damaged.
    """
    manifests = _manifests(stream)
    unknown = [s for s in stream.shards if not _is_vouched_for(s, manifests, vocab_size)]
    if sum(shard.tokens.nbytes for shard in unknown) > MAX_SCANNED_BYTES:
        stream.limit_ids(vocab_size)
        return
    for shard in unknown[rank::world_size]:
        shard.check_ids(vocab_size)


def known_byte_lengths(
    stream: TokenStream, tokenizer: Tokenizer, vocab_size: int
) -> np.ndarray | None:
    """Bytes of text that each id of a stream stands for, int32 of shape (tokenizer.vocab_size,).

    None where that is not known: a manifest names another tokenizer, or none is named and the
    model's vocabulary is larger than this tokenizer's.
    """
    manifests = _manifests(stream)
    for shard in stream.shards:
        manifest = manifests.get(_name_of(shard))
        named = None if manifest is None else _fingerprint_of(manifest)
        if named is None and vocab_size > tokenizer.padded_vocab_size:
            return None
        if named not in (None, tokenizer.fingerprint):
            return None
    return tokenizer.token_byte_lengths


def document_end(stream: TokenStream, tokenizer: Tokenizer) -> int:
    """The token that ends every document of a stream: as the shards' manifests say, and of shards
    without one this tokenizer's.

    Raises:
        DataError: a manifest does not say it, or shards say different ones.
    """
    manifests = _manifests(stream)
    found: dict[int, str] = {}
    for shard in stream.shards:
        manifest = manifests.get(_name_of(shard))
        end = tokenizer.eot_token if manifest is None else manifest.tokenizer.get("eot_token")
        if type(end) is not int:
            raise DataError(
                f"{shard.bin_path.parent / MANIFEST_NAME} names no eot_token, the token that ends "
                "a document: set data.mask_after_document_end to false"
            )
        found.setdefault(end, shard.bin_path.name)
    if len(found) > 1:
        ends = ", ".join(f"{end} in {name}" for end, name in found.items())
        raise DataError(
            f"shards of several tokenizers: their documents end with {ends}; set "
            "data.mask_after_document_end to false"
        )
    return next(iter(found))


def check_document_end(stream: TokenStream, end: int | None) -> None:
    """Refuse shards whose manifest says that another token than ``end``, ``model.document_end``,
    ends their documents: packed ones would see each other without a word. Shards that were made
    without an end (``--no-append-eod``) have what somebody else put there.

    Raises:
        ConfigError: names the manifest and both tokens.
    """
    for (folder, _), manifest in _manifests(stream).items() if end is not None else ():
        named = manifest.tokenizer.get("eot_token")
        appended = manifest.plan.get("append_eod", True)
        if appended and type(named) is int and named != end:
            raise ConfigError(
                f"model.document_end={end} ends no document of {folder}: its {MANIFEST_NAME} says "
                f"that {named} does; set model.document_end to that"
            )


def _manifests(stream: TokenStream) -> dict[tuple[Path, str], Manifest]:
    """The manifest that lists a shard, by the shard's folder and name."""
    folders = dict.fromkeys(shard.bin_path.parent for shard in stream.shards)
    return {
        (folder, summary.name): manifest
        for folder in folders
        if (folder / MANIFEST_NAME).exists()
        for manifest in [Manifest.load(folder)]
        for summaries in manifest.splits.values()
        for summary in summaries
    }


def _name_of(shard: Shard) -> tuple[Path, str]:
    return shard.bin_path.parent, shard.bin_path.name.removesuffix(".bin")


def _is_vouched_for(
    shard: Shard, manifests: dict[tuple[Path, str], Manifest], vocab_size: int
) -> bool:
    if shard.dtype.kind == "u" and np.iinfo(shard.dtype).max < vocab_size:
        return True
    manifest = manifests.get(_name_of(shard))
    known = manifest.tokenizer.get("vocab_size") if manifest is not None else None
    return isinstance(known, int) and known <= vocab_size


def _fingerprint_of(manifest: Manifest) -> object:
    return manifest.tokenizer.get("fingerprint")
