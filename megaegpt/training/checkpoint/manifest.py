"""The list of a checkpoint's files with their checksums: a damaged one is found and named."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaegpt.config import BatchRampConfig
from megaegpt.errors import CheckpointError
from megaegpt.files import sha256_of_file, sync_file, whole_file
from megaegpt.json_files import conform, read_json

MANIFEST = "manifest.json"
_FORMAT = 1
_REMEDY = "write the name of another checkpoint into the file `latest`"


@dataclass(frozen=True)
class FileEntry:
    """The size and checksum of one file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal digest of the content."""


@dataclass(frozen=True)
class Topology:
    """The parallelism, precision and parameter groups that decide the layout of a checkpoint's
    files; to be resumed under another parallelism or other groups it is reshaped.
    """

    tensor_parallel: int
    data_parallel: int
    zero_stage: int
    precision: str
    parameter_groups: list[str] = field(default_factory=list)
    """Patterns of ``optimizer.groups``, in their order."""
    vectors: list[str] = field(default_factory=list)
    """Parameters of several rows that are grouped as vectors; earlier versions had none."""

    def __str__(self) -> str:
        groups = f", parameter groups {' '.join(self.parameter_groups)}"
        vectors = f", without decay {' '.join(self.vectors)}"
        return (
            f"tensor parallel {self.tensor_parallel} x data parallel {self.data_parallel}, "
            f"ZeRO stage {self.zero_stage}, {self.precision}"
            f"{groups if self.parameter_groups else ''}{vectors if self.vectors else ''}"
        )


@dataclass(frozen=True)
class _TrainerState:
    """The types of what a resumed run reads of the loop's state. Earlier versions lack some of it;
    what else there is, is not read."""

    step: int = 0
    skipped: int = 0
    spikes: int = 0
    seed: int | None = None
    global_batch_size: int | None = None
    batch_ramp: BatchRampConfig | None = None
    shards: str = ""
    encoder: str | None = None
    encoder_arithmetic: dict[str, Any] | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint."""

    step: int
    """Optimizer steps done."""
    topology: dict[str, Any]
    """Layout of the files (:class:`Topology` as a dictionary)."""
    parameters: dict[str, list[int]]
    """Full shape of every trainable parameter."""
    trainer: dict[str, Any]
    """State of the training loop."""
    files: dict[str, FileEntry]
    """By path relative to the checkpoint."""
    saved_at_ns: int = field(default_factory=time.time_ns)
    """Wall-clock time, to tell which of two checkpoints is newer."""

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` durably."""
        body = {**vars(self), "files": {name: vars(e) for name, e in self.files.items()}}
        content = json.dumps({"format": _FORMAT, "sha256": digest_of(body), **body}, indent=1)
        with whole_file(folder / MANIFEST) as temporary:
            temporary.write_text(content, encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check ``manifest.json``.

        Raises:
            CheckpointError: it is missing, damaged, or of another format.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST} is missing")
        body = read_json(path, dict[str, Any], error=CheckpointError, remedy=_REMEDY)
        version, digest = body.pop("format", None), body.pop("sha256", None)
        if version != _FORMAT:
            raise CheckpointError(f"{path} has format {version}; this version reads {_FORMAT}")
        if digest != digest_of(body):
            raise CheckpointError(f"{path} is damaged (its checksum differs): {_REMEDY}")
        check = functools.partial(conform, error=CheckpointError, remedy=_REMEDY)
        manifest = check(body, Manifest, str(path))
        check(manifest.topology, Topology, f"{path}, topology,")
        check(manifest.trainer, _TrainerState, f"{path}, trainer,", other_keys=True)
        return manifest


def digest_of(body: dict[str, Any]) -> str:
    """The sha256 of a manifest's fields, whatever their order and the white space between them."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def describe_files(paths: Iterable[Path], folder: Path) -> dict[str, FileEntry]:
    """Flush each file to disk and compute its entry, by its path relative to ``folder``."""
    entries = {}
    for path in paths:
        sync_file(path)
        entry = FileEntry(path.stat().st_size, sha256_of_file(path))
        entries[path.relative_to(folder).as_posix()] = entry
    return entries


def verify_files(entries: dict[str, FileEntry], folder: Path) -> None:
    """Check that each file is what it was when it was saved.

    Raises:
        CheckpointError: names the first file that is missing, cut short, or changed.
    """
    for name, entry in entries.items():
        path = folder / name
        try:
            size, digest = path.stat().st_size, sha256_of_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {_REMEDY}") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if size != entry.size:
            raise CheckpointError(f"{path} has {size} bytes instead of {entry.size}: {_REMEDY}")
        if digest != entry.sha256:
            raise CheckpointError(f"{path} is damaged (its checksum differs): {_REMEDY}")
