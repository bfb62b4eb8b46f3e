"""The header of a GGUF file, llama.cpp's form of a model: its metadata, and where its tensors are.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Nothing is
allocated for a length that the file cannot hold, and no tensor reaches beyond its end.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaegpt.errors import CheckpointError
from megaegpt.files import LFS_POINTER, LFS_POINTER_MESSAGE

SUFFIX = ".gguf"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""The struct format of each type of a value."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor's entry in the header."""

    name: str
    shape: tuple[int, ...]
    """As PyTorch has it: rows first."""
    type_number: int
    """ggml's number of its element type or quantisation."""
    offset: int
    """Byte of the file where its data begins."""


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a file."""

    path: Path
    metadata: dict[str, Any]
    """Values by key: numbers, texts, booleans, and lists of these."""
    tensors: dict[str, GGUFTensor]
    size: int
    """Bytes of the file."""


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """The metadata and the tensors' entries of a file, without its data.

    Raises:
        CheckpointError: it is missing, no GGUF file, damaged or cut short.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist or is no regular file")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{path} is {LFS_POINTER_MESSAGE}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Header(content).read(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged or no GGUF file: {error}") from None


class _Header:
    """A cursor over the file's bytes; every step stays within them."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._size, self._at = content, len(content), 0

    def read(self, path: Path) -> GGUFHeader:
        if self._bytes(len(_MAGIC)) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in _VERSIONS:
            order = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise ValueError(f"its version is {version}{order}; this program reads 2 and 3")
        tensor_count, key_count = self._count(32), self._count(13)  # the least bytes of an entry
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"the key {key[:80]} occurs twice")
            metadata[key] = self._value(self._scalar("<I"))
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
        if type(alignment) is not int or alignment <= 0:
            raise ValueError(f"{_ALIGNMENT_KEY} is {alignment}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_number, offset in entries:
            if name in tensors:
                raise ValueError(f"the tensor {name[:80]} occurs twice")
            if start + offset > self._size:
                raise ValueError(f"it is cut short: the tensor {name[:80]} is beyond its end")
            tensors[name] = GGUFTensor(name, shape, type_number, start + offset)
        return GGUFHeader(path, metadata, tensors, self._size)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar("<I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name[:80]} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._bytes(8 * dimensions))
        if 0 in shape or math.prod(shape) >= 2**63:
            raise ValueError(f"the tensor {name[:80]} has shape {shape[::-1]}")
        return name, shape[::-1], self._scalar("<I"), self._scalar("<Q")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > 1:
            raise ValueError(f"a value of type {kind} at byte {self._at:,}")
        inner = self._scalar("<I")
        if inner in _SCALARS:
            code, size = _SCALARS[inner][1], struct.calcsize(_SCALARS[inner])
            count = self._count(size)
            return list(struct.unpack(f"<{count}{code}", self._bytes(count * size)))
        return [self._value(inner, depth + 1) for _ in range(self._count(8))]

    def _count(self, least_bytes: int) -> int:
        """A number of things that take at least so many bytes each."""
        count: int = self._scalar("<Q")
        if count * least_bytes > self._size - self._at:
            raise ValueError(f"a length of {count:,} at byte {self._at - 8:,} is beyond its end")
        return count

    def _string(self) -> str:
        return self._bytes(self._count(1)).decode("utf-8")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise ValueError(f"it is cut short at byte {self._size:,}")
        self._at += count
        return self._content[self._at - count : self._at]
