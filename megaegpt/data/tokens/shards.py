"""Token shards in Megatron's ``MMIDIDX`` format: tokens in ``.bin``, documents in ``.idx``.

``.idx``, little-endian and packed: magic (9 bytes), uint64 version, uint8 type code, uint64
sequences N, uint64 documents + 1 = D, then int32 lengths[N] in tokens, int64 pointers[N] in bytes,
int64 documents[D] (the number of the first sequence of each document, then N). Our writer makes
one sequence a document.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megaegpt.data.tokens.memory_map import map_bytes
from megaegpt.errors import DataError
from megaegpt.files import (
    LFS_POINTER,
    LFS_POINTER_MESSAGE,
    is_lfs_pointer,
    naming_failures,
    publish,
    temporary_name,
)

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODE_OF_TYPE = {dtype: code for code, dtype in TYPE_OF_CODE.items()}
BLOCK = 1 << 20  # index entries handled at once: memory stays constant whatever the corpus


@dataclass(frozen=True)
class ShardSummary:
    """The counts and checksums of a finished shard; the checksums are of whole files."""

    name: str
    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


class ShardWarning(UserWarning):
    """Shards of another program that are read otherwise than their index says."""


class ShardWriter:
    """Write one shard in constant memory; it exists completely after :meth:`finish`, or not at all.

    Use as a context manager: leaving it without ``finish`` removes every trace.

    Args:
        prefix: path of the shard without ``.bin`` and ``.idx``.
        dtype: integer type of the stored tokens, see ``Tokenizer.dtype``.

    Raises:
        DataError: the type has no code in the format, or a file cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type = np.uint16) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        if self._dtype not in CODE_OF_TYPE:
            raise DataError(f"shards cannot hold {np.dtype(dtype)}; use uint16 or int32")
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        self._digest = hashlib.sha256()
        self.documents = 0
        self.tokens = 0
        with naming_failures(self._bin):
            self._bin_file = open(temporary_name(self._bin), "wb")  # noqa: SIM115
            self._idx_file = open(temporary_name(self._idx), "w+b")  # noqa: SIM115
            self._idx_file.write(bytes(HEADER.size))

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: ids of all documents back to back.
            lengths: number of tokens of each document; they sum to ``len(tokens)``.

        Raises:
            DataError: a document is longer than the format can say, or the disk is full.
        """
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise DataError(f"{self._bin}: a document of {lengths.max()} tokens exceeds 2^31 - 1")
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths sum to {int(lengths.sum())}, tokens are {len(tokens)}")
        content = np.ascontiguousarray(tokens, dtype=self._dtype).data.cast("B")
        with naming_failures(self._bin):
            self._bin_file.write(content)
            self._idx_file.write(lengths.astype("<i4").tobytes())
        self._digest.update(content)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document."""
        self.add(tokens, np.array([len(tokens)], dtype=np.int64))

    def finish(self, before_publishing: Callable[[], None] | None = None) -> ShardSummary:
        """Complete the index and publish both files, the index last.

        Args:
            before_publishing: called when both files are on disk and not yet in their places.

        Raises:
            DataError: the disk is full; what was there before this writer is then still there.
        """
        with naming_failures(self._idx):
            self._write_pointers()
            self._idx_file.write(np.arange(self.documents + 1, dtype="<i8").tobytes())
            self._idx_file.seek(0)
            code = CODE_OF_TYPE[self._dtype]
            header = HEADER.pack(MAGIC, VERSION, code, self.documents, self.documents + 1)
            self._idx_file.write(header)
            for file in (self._bin_file, self._idx_file):
                file.flush()
                os.fsync(file.fileno())
            self._idx_file.seek(0)
            idx_sha256 = hashlib.file_digest(self._idx_file, "sha256").hexdigest()
            self._close()
            if before_publishing is not None:
                before_publishing()
            self._idx.unlink(missing_ok=True)  # never an old index over new tokens
            publish(temporary_name(self._bin), self._bin)
            publish(temporary_name(self._idx), self._idx)
        return ShardSummary(
            self._bin.stem, self.documents, self.tokens, self._digest.hexdigest(), idx_sha256
        )

    def _write_pointers(self) -> None:
        """Read the streamed lengths back and append their exclusive prefix sums, in bytes."""
        position = 0
        for start in range(0, self.documents, BLOCK):
            count = min(BLOCK, self.documents - start)
            self._idx_file.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(self._idx_file.read(4 * count), dtype="<i4").astype("<i8")
            ends = position + np.cumsum(lengths * self._dtype.itemsize)
            pointers = np.concatenate([np.array([position], dtype="<i8"), ends[:-1]])
            self._idx_file.seek(0, os.SEEK_END)
            self._idx_file.write(pointers.tobytes())
            position = int(ends[-1])
        self._idx_file.seek(0, os.SEEK_END)

    def _close(self) -> None:
        self._bin_file.close()
        self._idx_file.close()

    def abort(self) -> None:
        """Remove what has been written; does nothing after :meth:`finish`."""
        for file in (self._bin_file, self._idx_file):
            with contextlib.suppress(OSError):  # on a full disk the last buffer stays unwritten
                file.close()
        temporary_name(self._bin).unlink(missing_ok=True)
        temporary_name(self._idx).unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class Shard:
    """A shard, memory-mapped: opening it costs the same whatever its size.

    Attributes:
        state: of the token file when it was opened.
        tokens: (tokens,) all tokens, documents back to back, in the type that the header names.
        sequence_lengths: (N,) int32, in tokens.
        sequence_pointers: (N,) int64, in bytes.

    Raises:
        DataError: a file is missing, truncated, foreign, of another version, or they do not match.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = bin_path(prefix), idx_path(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist: a shard is a .bin and an .idx file")
        index = map_bytes(self.idx_path)
        self.dtype, sequences, documents = self._read_header(index)
        offset = HEADER.size
        self.sequence_lengths = index[offset : offset + 4 * sequences].view("<i4")
        offset += 4 * sequences
        self.sequence_pointers = index[offset : offset + 8 * sequences].view("<i8")
        offset += 8 * sequences
        self._documents = index[offset : offset + 8 * documents].view("<i8")
        self._documents_are_sequences = False
        self.state = state_of(self.bin_path)  # before it is mapped: what comes after is a change
        self._check_ends()
        self.tokens = map_bytes(self.bin_path).view(self.dtype)

    def _read_header(self, index: np.ndarray) -> tuple[np.dtype[Any], int, int]:
        path = self.idx_path
        head = index[: HEADER.size].tobytes()
        if head.startswith(OLD_MAGIC):
            raise DataError(f"{path} is in the old TNTIDX format: preprocess the text again")
        if head.startswith(LFS_POINTER[: HEADER.size]):
            raise DataError(f"{path}: {LFS_POINTER_MESSAGE}")
        if not head.startswith(MAGIC):
            raise DataError(f"{path} is not a shard index: it does not start with MMIDIDX")
        if len(head) < HEADER.size:
            raise DataError(f"{path} is truncated: {len(head)} bytes, a header has {HEADER.size}")
        _, version, code, sequences, documents = HEADER.unpack(head)
        if version != VERSION:
            raise DataError(f"{path} has version {version}; only version {VERSION} is known")
        if code not in TYPE_OF_CODE:
            raise DataError(f"{path} has type code {code}, which no token type has")
        expected = HEADER.size + 12 * sequences + 8 * documents
        if len(index) != expected:
            kind = "truncated" if len(index) < expected else "too long"
            raise DataError(
                f"{path} is {kind}: {len(index)} bytes, its header announces {expected} "
                f"({sequences} sequences, {documents - 1} documents)"
            )
        return TYPE_OF_CODE[code], sequences, documents

    def _check_ends(self) -> None:
        """Check the ends of the index's arrays, without reading all of it."""
        lengths, pointers = self.sequence_lengths, self.sequence_pointers
        documents = self._documents
        if not len(documents) or documents[0] != 0 or documents[-1] > len(lengths):
            raise DataError(f"{self.idx_path} is damaged: its documents do not cover its sequences")
        if documents[-1] < len(lengths):
            self._documents_are_sequences = True
            warnings.warn(
                f"{self.idx_path}: its documents do not cover its sequences, as GPT-NeoX's merge "
                "leaves it; each sequence is read as a document",
                ShardWarning,
                stacklevel=3,
            )
        if len(pointers) and pointers[0] != 0:
            raise DataError(f"{self.idx_path} is damaged: its first sequence does not start at 0")
        size = int(pointers[-1]) + int(lengths[-1]) * self.dtype.itemsize if len(lengths) else 0
        actual = self.bin_path.stat().st_size
        if actual != size:
            if is_lfs_pointer(self.bin_path):
                raise DataError(f"{self.bin_path}: {LFS_POINTER_MESSAGE}")
            kind = "truncated" if actual < size else "too long"
            raise DataError(f"{self.bin_path} is {kind}: {actual} bytes, its index says {size}")

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        if self._documents_are_sequences:
            return len(self.sequence_lengths)
        return len(self._documents) - 1

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """(last - first + 1,) int64: the first sequence of each of these documents, then the one
        that follows the last of them."""
        if self._documents_are_sequences:
            return np.arange(first, last + 1)
        return self._documents[first : last + 1]

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, a view of the map."""
        first, last = self.document_starts(number, number + 1).tolist()
        if first == last:
            return self.tokens[:0]
        start = int(self.sequence_pointers[first]) // self.dtype.itemsize
        end = int(self.sequence_pointers[last - 1]) // self.dtype.itemsize
        return self.tokens[start : end + int(self.sequence_lengths[last - 1])]

    def verify(self, vocab_size: int | None = None) -> None:
        """Read everything: the index must be consistent and every token inside the vocabulary.

        Raises:
            DataError: names the first thing that is wrong.
        """
        position = 0
        for start in range(0, len(self.sequence_lengths), BLOCK):
            lengths = self.sequence_lengths[start : start + BLOCK].astype(np.int64)
            if lengths.min() < 0:
                raise DataError(f"{self.idx_path} is damaged: a sequence has a negative length")
            ends = position + np.cumsum(lengths * self.dtype.itemsize)
            pointers = self.sequence_pointers[start : start + BLOCK]
            if pointers[0] != position or not np.array_equal(pointers[1:], ends[:-1]):
                raise DataError(
                    f"{self.idx_path} is damaged: the sequences from number {start} on do not "
                    "follow each other"
                )
            position = int(ends[-1])
        for start in range(0, len(self._documents), BLOCK):
            if (np.diff(self._documents[start : start + BLOCK + 1]) < 0).any():
                raise DataError(f"{self.idx_path} is damaged: its document starts go backwards")
        self.check_ids(vocab_size)

    def check_ids(self, vocab_size: int | None = None) -> None:
        """Read all tokens: each must be inside the vocabulary; None: not negative.

        Raises:
            DataError: names the first that is not, and its place.
        """
        for start in range(0, len(self.tokens), BLOCK):
            block = self.tokens[start : start + BLOCK]
            most = np.iinfo(self.dtype).max + 1 if vocab_size is None else vocab_size
            if block.min() < 0 or block.max() >= most:
                at = int(np.flatnonzero((block < 0) | (block >= most))[0])
                raise self.foreign_id(start + at, int(block[at]), most)

    def foreign_id(self, position: int, token: int, vocab_size: int) -> DataError:
        """Make the error for a token that is outside the vocabulary.

        Args:
            position: of the token in the file.
        """
        return DataError(
            f"{self.bin_path} holds id {token} at token {position:,}, outside the vocabulary of "
            f"{vocab_size}: these tokens are another tokenizer's, or damaged"
        )


@dataclass(frozen=True)
class FileState:
    """By what a file is told from one that has taken its place, or that has been written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    def is_same_file(self, other: FileState) -> bool:
        """Whether only the time of the last write may differ."""
        return (self.device, self.inode, self.size) == (other.device, other.inode, other.size)


def state_of(file: Path | int) -> FileState:
    """Of a file by its path or descriptor.

    Raises:
        DataError: it is gone.
    """
    try:
        state = os.stat(file)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    return FileState(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


def bin_path(prefix: str | Path) -> Path:
    """The token file of a shard."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a shard."""
    return Path(f"{prefix}.idx")
