"""The tokenizer of shards: its files beside them, and what their manifest says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from megaegpt.data.readers.inputs import SHARD_TOKENIZER
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import (
    has_tokenizer,
    load_tokenizer,
    remove_tokenizer,
    save_tokenizer,
)
from megaegpt.data.tokens.corpus_manifest import MANIFEST_NAME, Manifest
from megaegpt.errors import ConfigError, DamagedManifestError, DataError
from megaegpt.files import naming_failures


def check_tokenizer_place(tokenizer: Tokenizer, output: Path) -> None:
    """Refuse to put shards beside a tokenizer that neither is theirs nor that of the shards that
    they replace: it is somebody's, and whoever reads the shards would take it for theirs.

    Raises:
        DataError: names it.
    """
    folder = output / SHARD_TOKENIZER
    if not has_tokenizer(folder):
        return
    found = load_tokenizer(folder).fingerprint
    earlier = None
    if (output / MANIFEST_NAME).exists():
        with contextlib.suppress(DamagedManifestError):  # it does not tell whose the tokenizer is
            earlier = Manifest.load(output).tokenizer.get("fingerprint")
    if found not in (tokenizer.fingerprint, earlier):
        raise DataError(
            f"{folder} holds a tokenizer that the shards would not be made with: name it by "
            "--vocabulary, or choose another --output"
        )


def remove_replaced(tokenizer: Tokenizer, output: Path, replaced: Manifest) -> None:
    """Remove the tokenizer of the shards that a manifest in ``output`` lists, unless those that
    replace them are made with it too: without that manifest it would be taken for somebody's.

    Args:
        replaced: the manifest.

    Raises:
        DataError: it cannot be removed.
    """
    folder = output / SHARD_TOKENIZER
    with naming_failures(folder):
        if has_tokenizer(folder):
            found = load_tokenizer(folder).fingerprint
            if found == replaced.tokenizer.get("fingerprint") != tokenizer.fingerprint:
                remove_tokenizer(folder)


def save_beside_shards(tokenizer: Tokenizer, output: Path) -> None:
    """Write the tokenizer's files, in place of those that give the same ids and say something else
    of chats or of where texts end (others are not there: see :func:`check_tokenizer_place` and
    :func:`remove_replaced`); GPT-2's needs none.

    Raises:
        DataError: they cannot be written.
    """
    folder = output / SHARD_TOKENIZER
    if tokenizer.is_installed:
        return
    if has_tokenizer(folder) and load_tokenizer(folder).files() == tokenizer.files():
        return  # in another form, it may be: it is the one that the user has named
    with naming_failures(folder):
        remove_tokenizer(folder)
        folder.mkdir(exist_ok=True)
        save_tokenizer(tokenizer, folder)


def tokenizer_of_shards(prefixes: Sequence[str], vocabulary: str | None) -> Tokenizer:
    """The tokenizer of a configuration, or where it names none the one beside the first shards that
    have one, or GPT-2's.

    Raises:
        DataError: it cannot be loaded.
    """
    places = [Path(prefix).parent / SHARD_TOKENIZER for prefix in prefixes]
    beside = next((str(place) for place in places if has_tokenizer(place)), None)
    return load_tokenizer(vocabulary or beside)


def check_same_tokenizer(prefixes: Sequence[str], tokenizer: Tokenizer) -> None:
    """Refuse shards whose manifest names another tokenizer; those without one are taken as given.

    Raises:
        DataError: names the shards and both tokenizers.
    """
    for folder in dict.fromkeys(Path(prefix).parent for prefix in prefixes):
        if not (folder / MANIFEST_NAME).exists():
            continue
        named = Manifest.load(folder).tokenizer
        fingerprint = named.get("fingerprint")
        if fingerprint in (None, tokenizer.fingerprint):
            continue
        raise DataError(
            f"the shards in {folder} were made with the tokenizer {named.get('name')} "
            f"(fingerprint {str(fingerprint)[:12]}), not with {tokenizer.name} "
            f"({tokenizer.fingerprint[:12]}): set data.vocabulary to theirs, or make them again"
        )


def check_model_knows(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model that has fewer ids than the tokenizer.

    Raises:
        ConfigError: names both numbers.
    """
    if vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the vocabulary of the tokenizer "
            f"{tokenizer.name}: set it to {tokenizer.vocab_size}"
        )
