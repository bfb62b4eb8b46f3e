"""``manifest.json``: what a folder of shards holds, and the checksums to hold it against."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaegpt.bars import progress_bar
from megaegpt.config.data import VerifyPolicy
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.shards import ShardSummary, bin_path, idx_path
from megaegpt.errors import DamagedManifestError, DataError
from megaegpt.files import is_special, sha256_of_file, write_whole
from megaegpt.json_files import conform, parse_json, read_content

MANIFEST_NAME = "manifest.json"
AUTO_VERIFY_BYTES = 4 << 30
"""Bytes of shards that the policy ``auto`` still reads to verify their checksums."""

_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """A finished corpus.

    Attributes:
        tokenizer: fingerprint, vocabulary size and end-of-text id.
        plan: inputs and options of the run that made it, as plain data.
        counts: documents, tokens and bytes of text, and what was left out.
        splits: the shards of each split, in order.
    """

    tokenizer: dict[str, Any]
    plan: dict[str, Any]
    counts: dict[str, int]
    splits: dict[str, list[ShardSummary]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Publish ``manifest.json`` in ``folder``."""
        content = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        # A byte of a file's name that is not UTF-8 is half a surrogate pair here, and JSON escapes
        # it as Python does.
        raw = content.encode("utf-8", "backslashreplace")
        write_whole(folder / MANIFEST_NAME, raw + b"\n")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read ``manifest.json`` of ``folder``.

        Raises:
            DamagedManifestError: it is damaged.
            DataError: it is missing, another program's, or of another format.
        """
        path = folder / MANIFEST_NAME
        remedy = "make the shards again with --overwrite, or copy it again"
        content = read_content(path, missing="these shards have no manifest")
        fields = parse_json(content, Any, str(path), error=DamagedManifestError, remedy=remedy)
        if not isinstance(fields, dict) or not {"format", "splits"} <= fields.keys():
            raise DataError(
                f"{path} is not a manifest of shards of this program, which have theirs under this "
                "name: keep it, or the shards, in another folder"
            )
        found = fields.pop("format")
        if found != _FORMAT:
            raise DataError(f"{path} has format {found!r:.50}; only {_FORMAT} is known")
        error = DamagedManifestError
        manifest = conform(fields, Manifest, str(path), error=error, remedy=remedy)
        try:
            whole_numbers(manifest.counts)
            for shard in itertools.chain.from_iterable(manifest.splits.values()):
                parse_summary(asdict(shard))
        except (ValueError, TypeError) as reason:
            raise error(f"{path} is damaged: {reason}; {remedy}") from None
        return manifest

    def verify(self, folder: Path) -> None:
        """Compare the checksums of all shards.

        Raises:
            DataError: names the first file that is missing or has changed.
        """
        for path, checksum in self.checksums(folder).items():
            _verify_file(path, checksum)

    def checksums(self, folder: Path) -> dict[Path, str]:
        """sha256 of every file of the shards, in order."""
        checksums = {}
        for shard in (shard for shards in self.splits.values() for shard in shards):
            prefix = folder / shard.name
            checksums[bin_path(prefix)] = shard.bin_sha256
            checksums[idx_path(prefix)] = shard.idx_sha256
        return checksums


def parse_summary(fields: Any) -> ShardSummary:
    """A shard's entry out of JSON.

    Raises:
        ValueError: a value is not what the entry has there.
        TypeError: it is no object, or has other keys.
    """
    summary = ShardSummary(**fields)
    texts = (summary.name, summary.bin_sha256, summary.idx_sha256)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a shard's name and checksums are texts, not {texts!r:.80}")
    if Path(summary.name).name != summary.name or "\0" in summary.name:
        raise ValueError(f"{summary.name!r:.80} is no name of a shard in this folder")
    whole_numbers({"documents": summary.documents, "tokens": summary.tokens})
    return summary


def whole_numbers(counts: Any) -> dict[str, int]:
    """Counts out of JSON.

    Raises:
        ValueError: they are no object of numbers from 0 on.
    """
    if not isinstance(counts, dict):
        raise ValueError("the counts are no object")
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} is {count!r:.50}, not a count")
    return counts


def verify_shards(
    prefixes: Sequence[str],
    policy: VerifyPolicy = "auto",
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Hold shards against the manifests beside them; ranks share the files.

    Shards without a manifest, from other programs, have nothing to be held against.

    Args:
        prefixes: of single shards that are there, as
            :func:`megaegpt.data.tokens.stream.resolve_prefixes` gives them.
        policy: ``auto`` leaves more than 4 GiB alone, which take longer than a start should.

    Raises:
        DataError: names the first file that has changed, or a manifest that cannot be read.
    """
    if policy == "never":
        return
    wanted = {path for prefix in prefixes for path in (bin_path(prefix), idx_path(prefix))}
    folders = dict.fromkeys(path.parent for path in map(bin_path, prefixes))
    manifests = {f: Manifest.load(f) for f in folders if (f / MANIFEST_NAME).exists()}
    listed = [entry for f, m in manifests.items() for entry in m.checksums(f).items()]
    files = [(path, checksum) for path, checksum in listed if path in wanted]
    sizes = [path.stat().st_size for path, _ in files]
    long = sum(sizes) > AUTO_VERIFY_BYTES
    if policy == "auto" and long:
        return
    largest_first = sorted(range(len(files)), key=lambda number: -sizes[number])
    for number in progress_bar(
        largest_first[rank::world_size], "checksums", unit="file", disable=rank > 0 or not long
    ):
        _verify_file(*files[number])


def _verify_file(path: Path, checksum: str) -> None:
    if is_special(path):
        raise DataError(f"{path} is a pipe or a device, not a file")
    try:
        found = sha256_of_file(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {path.parent / MANIFEST_NAME} lists it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if found != checksum:
        raise DataError(
            f"{path} has changed: its sha256 is not the one in {path.parent / MANIFEST_NAME}; "
            "make the shards again, or copy them again"
        )


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Make a manifest's entry on the tokenizer."""
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot_token": tokenizer.eot_token,
    }
