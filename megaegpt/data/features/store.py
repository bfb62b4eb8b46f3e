"""The store of chunk features that EGPT remembers a long document by.

A frozen encoder's states never change, so they are computed once, over all data-parallel ranks, and
memory-mapped afterwards. A store is a folder:

    plan.json                what the store is of (encoder, shards, chunk size, type)
    features-00000.npy       (chunks, 1, C): the state of the last token of a part's chunks
    token_states-00000.npy   (chunks, S, C): every token's state, if asked for
    manifest.json            the plan and every part's sha256; published last: a store without it is
                             incomplete

One of what a frozen decoder predicts from such states (``FeatureSpec.decoder``) has in their place

    hidden-00000.npy             (chunks, S, C): what its head reads
    log_probabilities-00000.npy  (chunks, S): what it gives the token behind each, in float32

Parts hold the same chunks however many ranks write them, so the bytes do not depend on the number
of ranks. bfloat16 is stored as uint16 bit patterns (NumPy has no such type).

Shapes: S tokens of a chunk, C hidden size.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megaegpt import json_files
from megaegpt.config.arithmetic import DIGEST_VERSION
from megaegpt.config.data import VerifyPolicy
from megaegpt.data.tokens.memory_map import ResidentPages, allow_many_maps
from megaegpt.errors import DataError
from megaegpt.files import sha256_of_file, write_whole

MANIFEST, PLAN = "manifest.json", "plan.json"
STORED_AS: dict[str, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16}

AUTO_VERIFY_BYTES = 4 << 30
"""Bytes of a store that the policy ``auto`` still reads to verify its checksums."""

PREDICTIONS = ("hidden", "log_probabilities")
"""The arrays of a store of what a decoder predicts."""

_FORMAT_VERSION = 1
_FEATURES = {"features_per_chunk": 1, "pooling": "last"}
"""What a plan says of the features; stores of earlier versions may have others."""
_MOST_PARTS, _SMALLEST_PART = 256, 16  # parts are the unit of sharing work and of continuing it


@dataclass(frozen=True)
class FeatureSpec:
    """The identity of a store's content: two stores of equal specs hold the same numbers."""

    encoder: str
    """Fingerprint of the frozen encoder's weights."""
    shards: str
    """Fingerprint of the token stream."""
    num_chunks: int
    """From the stream's start on; of a partial one, padded by token 0, where it is counted."""
    chunk_size: int
    """Tokens in a chunk (S)."""
    hidden_size: int
    """Width of a vector (C)."""
    dtype: Literal["float32", "bfloat16"]
    """Storage type."""
    token_states: bool = False
    """Whether every token's state is stored too."""
    overlap: int = 0
    """Tokens before a chunk that the encoder saw too. A store of an earlier version has none and
    does not say so."""
    encoder_arithmetic: str = ""
    """Digest of all else that decides the encoder's states, and no tensor's shape or value: heads,
    positions; see :func:`megaegpt.config.arithmetic.arithmetic_digest`. A store of an earlier
    version does not say it, or in a form that cannot be compared.
    """
    decoder: str = ""
    """Fingerprint of the frozen decoder whose predictions are stored; empty: the encoder's states
    are."""
    computed: str = ""
    """Precision that the encoder, or the decoder, computed in, whatever the storage type. A store
    of an earlier version does not say it."""

    @property
    def chunks_per_part(self) -> int:
        """Chunks in every part but the last: never a function of the number of ranks."""
        return max(_SMALLEST_PART, -(-self.num_chunks // _MOST_PARTS))

    @property
    def num_parts(self) -> int:
        """Parts of the whole store."""
        return -(-self.num_chunks // self.chunks_per_part)

    @property
    def num_bytes(self) -> int:
        """Disk space of the arrays."""
        return self.num_chunks * sum(
            math.prod(shape) * np.dtype(STORED_AS[self.dtype_of(array)]).itemsize
            for array, shape in self.arrays().items()
        )

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Name of each stored array and the shape of a chunk in it."""
        by_token: tuple[int, ...] = (self.chunk_size, self.hidden_size)
        if self.decoder:
            return dict(zip(PREDICTIONS, (by_token, by_token[:1]), strict=True))
        arrays: dict[str, tuple[int, ...]] = {"features": (1, self.hidden_size)}
        if self.token_states:
            arrays["token_states"] = by_token
        return arrays

    def dtype_of(self, array: str) -> Literal["float32", "bfloat16"]:
        """Storage type of an array: bfloat16 would leave three digits of a log-probability."""
        return "float32" if array == PREDICTIONS[1] else self.dtype

    def part_chunks(self, part: int) -> range:
        """Chunk numbers of a part."""
        start = part * self.chunks_per_part
        return range(start, min(start + self.chunks_per_part, self.num_chunks))

    def part_names(self) -> list[str]:
        """File names of all parts of all arrays."""
        return [part_name(array, part) for part in range(self.num_parts) for array in self.arrays()]

    def as_json(self) -> dict[str, Any]:
        """The content of plan and manifest, as JSON values."""
        return {"version": _FORMAT_VERSION, **asdict(self), **_FEATURES}


class FeatureStore:
    """A complete store, read through memory maps; threads may share it."""

    def __init__(self, folder: Path, spec: FeatureSpec, checksums: dict[str, str]) -> None:
        self.folder = folder
        self.spec = spec
        self._checksums = checksums
        self._parts: dict[tuple[str, int], np.ndarray] = {}
        self._pages = ResidentPages(spec.num_bytes)

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether a complete store (of anything) is there."""
        return (Path(folder) / MANIFEST).is_file()

    @staticmethod
    def open(folder: str | Path, expected: FeatureSpec) -> FeatureStore:
        """Open a complete store of what is ``expected``. One of tokens' states may have the partial
        chunk at its text's end besides.

        Raises:
            DataError: it is missing, incomplete, truncated, or of something else (named).
        """
        folder = Path(folder)
        if not FeatureStore.exists(folder):
            raise DataError(
                f"{folder}: no complete feature store; run tools/precompute_features.py"
            )
        manifest = read_json(folder / MANIFEST)
        if _has_partial_chunk_besides(manifest, expected):
            expected = replace(expected, num_chunks=expected.num_chunks + 1)
        check_same(folder, manifest, expected)
        checksums = manifest.get("parts")
        if not isinstance(checksums, dict) or not set(checksums) >= set(expected.part_names()):
            raise DataError(f"{folder / MANIFEST}: its list of parts is damaged; delete {folder}")
        for part in range(expected.num_parts):
            for array in expected.arrays():
                if problem := part_problem(folder, expected, array, part):
                    path = folder / part_name(array, part)
                    raise DataError(f"{path}: {problem}; delete {folder}")
        return FeatureStore(folder, expected, checksums)

    def history(self, chunk_ids: Tensor | np.ndarray) -> Tensor:
        """Features of chunks: ids (...) -> (..., C), on the CPU in the stored type."""
        return self._read("features", np.asarray(chunk_ids)).squeeze(-2)

    def token_states(self, chunk_ids: Tensor | np.ndarray) -> Tensor:
        """Encoder states of chunks: ids (...) -> (..., S, C), on the CPU in the stored type."""
        return self._read("token_states", np.asarray(chunk_ids))

    def predictions(self, chunk_ids: Tensor | np.ndarray) -> dict[str, Tensor]:
        """What a frozen decoder predicts in chunks: ids (...) -> by the names of ``PREDICTIONS``
        what its head reads (..., S, C) in the stored type, and log-probabilities of the tokens
        behind each (..., S) in fp32.
        """
        ids = np.asarray(chunk_ids)
        return {array: self._read(array, ids) for array in PREDICTIONS}

    def verify(self, policy: VerifyPolicy = "always", rank: int = 0, world_size: int = 1) -> None:
        """Read the parts and compare their sha256 with the manifest's; ranks share the parts.

        Args:
            policy: ``auto`` leaves stores of more than 4 GiB alone, which take longer than a start
                should.

        Raises:
            DataError: names a damaged part.
        """
        if policy == "never" or (policy == "auto" and self.spec.num_bytes > AUTO_VERIFY_BYTES):
            return
        for name in self.spec.part_names()[rank::world_size]:
            path = self.folder / name
            try:
                found = sha256_of_file(path)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None
            if found != self._checksums[name]:
                raise DataError(
                    f"{path}: damaged, or a part of another store (its sha256 is not the one in "
                    f"{MANIFEST}); delete {self.folder}"
                )

    def _read(self, array: str, chunk_ids: np.ndarray) -> Tensor:
        shape = self.spec.arrays()[array]
        flat = chunk_ids.reshape(-1)
        dtype = self.spec.dtype_of(array)
        out = np.empty((flat.size, *shape), STORED_AS[dtype])
        self._pages.note(flat.size, out.nbytes, list(self._parts.values()))
        parts, rows = np.divmod(flat, self.spec.chunks_per_part)
        for part in np.unique(parts):
            wanted = parts == part
            out[wanted] = self._part(array, int(part))[rows[wanted]]
        values = torch.from_numpy(out.reshape(*chunk_ids.shape, *shape))
        return values.view(torch.bfloat16) if dtype == "bfloat16" else values

    def _part(self, array: str, part: int) -> np.ndarray:
        if (array, part) not in self._parts:
            allow_many_maps()
            path = self.folder / part_name(array, part)
            self._parts[array, part] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._parts[array, part]


def part_name(array: str, part: int) -> str:
    """File name of one part of one array."""
    return f"{array}-{part:05d}.npy"


def part_problem(folder: Path, spec: FeatureSpec, array: str, part: int) -> str | None:
    """Why the part's file cannot be a part of the store, by its presence, type, shape and size."""
    path = folder / part_name(array, part)
    shape = (len(spec.part_chunks(part)), *spec.arrays()[array])
    if not path.is_file():
        return "missing"
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # NumPy reads the header as Python, and a damaged one fails in any way
        return "truncated, or no array"
    dtype = spec.dtype_of(array)
    wanted = np.dtype(STORED_AS[dtype])
    if stored.dtype != wanted:
        return f"holds {stored.dtype} instead of {wanted}, as {dtype} is stored"
    if stored.shape != shape:
        return f"holds an array of {stored.shape} instead of {shape}"
    if path.stat().st_size != stored.offset + stored.nbytes:
        return "longer than its array"
    return None


def check_same(folder: Path, found: dict[str, Any], expected: FeatureSpec) -> None:
    """Compare a plan or manifest with what a run needs; token states may be there unneeded, and the
    encoder's arithmetic unsaid, or said as an earlier version did, and the precision unsaid.

    Raises:
        DataError: names everything that differs.
    """
    wanted, found = expected.as_json(), {"overlap": 0, "decoder": "", **found}
    harmless = set()
    if not str(found.get("encoder_arithmetic", "")).startswith(DIGEST_VERSION):
        harmless.add("encoder_arithmetic")
    if not expected.token_states:
        harmless.add("token_states")
    if not found.get("computed"):
        harmless.add("computed")
    differences = [
        f"{name} is {short_value(found.get(name))} there and {short_value(value)} here"
        for name, value in wanted.items()
        if found.get(name) != value and name not in harmless
    ]
    if differences:
        raise DataError(
            f"{folder}: the feature store is of something else: {'; '.join(differences)}. "
            "Delete the folder, or set data.features to another one"
        )


def _has_partial_chunk_besides(found: dict[str, Any], expected: FeatureSpec) -> bool:
    """Whether a store differs so: its chunks are the same, in parts that may be others."""
    unneeded = found.get("token_states") is True and not expected.token_states
    return unneeded and found.get("num_chunks") == expected.num_chunks + 1


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DataError if it is unreadable."""
    return json_files.read_json(path, dict[str, Any], remedy=f"delete {path.parent}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Publish a JSON object whole or not at all; DataError if it cannot be written."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def short_value(value: object) -> str:
    """A value of a spec for a message: fingerprints by their first digits."""
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
