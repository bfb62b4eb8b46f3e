"""``manifest.json``: what a folder of shards holds, and the checksums to hold it against."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaegpt.data.files import write_whole
from megaegpt.data.shards import ShardSummary, bin_path, idx_path
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import DataError

MANIFEST_NAME = "manifest.json"
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
        write_whole(folder / MANIFEST_NAME, content.encode() + b"\n")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read ``manifest.json`` of ``folder``.

        Raises:
            DataError: it is missing, damaged, or of another format.
        """
        path = folder / MANIFEST_NAME
        try:
            fields = json.loads(path.read_bytes())
            found = fields.pop("format")
            if found != _FORMAT:
                raise DataError(f"{path} has format {found}; only {_FORMAT} is known")
            fields["splits"] = {
                split: [ShardSummary(**shard) for shard in shards]
                for split, shards in fields["splits"].items()
            }
            return Manifest(**fields)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: these shards have no manifest") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}") from None

    def verify(self, folder: Path) -> None:
        """Compare the checksums of all shards.

        Raises:
            DataError: names the first file that is missing or has changed.
        """
        for shard in (shard for shards in self.splits.values() for shard in shards):
            prefix = folder / shard.name
            expected = {bin_path(prefix): shard.bin_sha256, idx_path(prefix): shard.idx_sha256}
            for path, checksum in expected.items():
                if not path.is_file():
                    raise DataError(f"{path} is missing; {folder / MANIFEST_NAME} lists it")
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                        raise DataError(f"{path} has changed: its sha256 is not the manifest's")


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says about the tokenizer."""
    return {
        "name": "gpt2",
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eot_token": tokenizer.eot_token,
    }
