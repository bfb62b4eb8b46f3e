"""One long row of tokens over any number of shards, memory-mapped."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from megaegpt.data.tokens.memory_map import ResidentPages
from megaegpt.data.tokens.shards import Shard, state_of
from megaegpt.errors import DataError

HASHED_BLOCK_BYTES = 1 << 20
HASHED_BLOCKS = 64
"""The fingerprint covers so many blocks of a large shard, evenly spread; smaller shards whole."""

MAX_OPEN_FILES = 256
"""Shards that a stream keeps open to read rows from; those read longest ago are closed."""

_PART_OF = re.compile(r"-(\d{5})-of-(\d{5})")
_LOOK_INTERVAL_S = 5.0
"""Seconds between looks at whether shards have changed: few against a run, and rarely a call."""


class TokenStream:
    """The documents of several shards, back to back, as one row of tokens.

    Args:
        prefixes: shard prefixes, prefixes of a set of shards, or globs (see
            :func:`resolve_prefixes`).

    Attributes:
        prefixes: of all shards.
        spans: first token and end of what each of the given prefixes stands for.

    Raises:
        DataError: no shard, a damaged shard, or shards without tokens.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        sets = [resolve_prefixes([prefix]) for prefix in prefixes]
        self.prefixes = [prefix for found in sets for prefix in found]
        self.shards = [Shard(prefix) for prefix in self.prefixes]
        self._tokens = [shard.tokens for shard in self.shards]
        self._ends = list(accumulate(len(tokens) for tokens in self._tokens))
        self._begins = [0, *self._ends[:-1]]
        bounds = [0, *accumulate(len(found) for found in sets)]
        self._pages = ResidentPages(sum(tokens.nbytes for tokens in self._tokens))
        types = {tokens.dtype for tokens in self._tokens}
        self._dtype = types.pop() if len(types) == 1 else None
        self._states = [shard.state for shard in self.shards]
        self._next_look = time.monotonic() + _LOOK_INTERVAL_S
        self._vocab_size: int | None = None
        self._file = lru_cache(MAX_OPEN_FILES)(self._open)
        tokens_before = [0, *self._ends]
        self.spans = [(tokens_before[a], tokens_before[b]) for a, b in pairwise(bounds)]
        if not self.shards or not self._ends[-1]:
            where = ", ".join(prefixes) or "an empty list of shards"
            raise DataError(
                f"no tokens in {where}: leave this split out, or make it of a larger share of the "
                "text"
            )

    def __len__(self) -> int:
        """Tokens."""
        return self._ends[-1]

    def name_at(self, start: int) -> str:
        """Prefix of the shard that a token is in, for messages."""
        return self.prefixes[bisect_right(self._ends, min(start, len(self) - 1))]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens from ``start`` on, in the shards' own type; a view where one shard has them all.

        Raises:
            IndexError: the span is not inside the stream.
            DataError: a token is outside the vocabulary that :meth:`limit_ids` has named.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start}..{start + length} of a stream of {len(self)}")
        self._look()
        self._pages.note(1, length * self._tokens[0].itemsize, self._tokens)
        parts = []
        first, shard = start, bisect_right(self._ends, start)
        while length > 0:
            tokens = self._tokens[shard]
            offset = start - self._begins[shard]
            part = tokens[offset : offset + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        if not parts:
            return self._tokens[0][:0]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self._vocab_size is not None:
            self._check_rows(np.array([first]), tokens[None], self._vocab_size)
        return tokens

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens on disk; int64 where the shards' types differ."""
        return np.dtype(np.int64 if self._dtype is None else self._dtype)

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out`` (n, length), of any integer type, with the spans that begin at ``starts``.

        Rows come by system calls, not through the map: that is faster, since the kernel maps far
        more than a row for each page that is not there, and the process does not grow by it.

        Raises:
            DataError: a file cannot be read or has changed, or a token is outside the vocabulary
                that :meth:`limit_ids` has named.
        """
        self._look()
        length = out.shape[1]
        row = np.empty(length, self._dtype)
        buffers = (row.data.cast("B"),)
        for number, start in enumerate(starts.tolist()):
            shard = bisect_right(self._ends, start)
            if self._dtype is None or start + length > self._ends[shard]:
                out[number] = self.read(start, length)
                continue
            file = self._file(shard)
            position = (start - self._begins[shard]) * row.itemsize
            try:
                count = os.preadv(file.descriptor, buffers, position)
            except OSError as error:
                raise DataError(f"cannot read {file.path}: {error.strerror}") from None
            if count < row.nbytes:
                raise DataError(f"{file.path} has become shorter since it was opened")
            out[number] = row
        if self._vocab_size is not None:
            self._check_rows(starts, out, self._vocab_size)

    def _look(self) -> None:
        """Now and then, see whether the shards are still what they were."""
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + _LOOK_INTERVAL_S
            self.check_unchanged()

    def limit_ids(self, vocab_size: int) -> None:
        """From now on, hold all that is read against a vocabulary."""
        self._vocab_size = vocab_size

    def _check_rows(self, starts: np.ndarray, rows: np.ndarray, vocab_size: int) -> None:
        if rows.min(initial=0) >= 0 and rows.max(initial=0) < vocab_size:
            return
        row, column = np.argwhere((rows < 0) | (rows >= vocab_size))[0].tolist()
        position = int(starts[row]) + column
        shard = bisect_right(self._ends, position)
        raise self.shards[shard].foreign_id(
            position - self._begins[shard], int(rows[row, column]), vocab_size
        )

    def check_unchanged(self) -> None:
        """Hold every shard's token file against what it was when the stream was opened.

        What takes a file's place by renaming leaves the memory map as it was, but not the files
        that rows are read from; what writes into a file changes both. A new time of writing alone
        is let pass if the content still has the fingerprint that was asked for before.

        Raises:
            DataError: names the first file that is another one or has changed.
        """
        for number, shard in enumerate(self.shards):
            known, state = self._states[number], state_of(shard.bin_path)
            if state == known:
                continue
            is_same = state.is_same_file(known) and self._digest() == vars(self).get("fingerprint")
            if not is_same:
                raise _changed(shard.bin_path)
            self._states[number] = state

    def _open(self, shard: int) -> _OpenFile:
        file = _OpenFile(self.shards[shard].bin_path)
        if not state_of(file.descriptor).is_same_file(self._states[shard]):
            raise _changed(file.path)
        return file

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that tells this row of tokens from any other.

        It covers all bytes of shards up to 64 MiB; of larger ones the size and 64 MiB spread
        evenly, so that it costs the same for any corpus.
        """
        return self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for shard in self.shards:
            content = shard.tokens.view(np.uint8)
            digest.update(f"{shard.dtype.str} {len(content)};".encode())
            if len(content) <= HASHED_BLOCKS * HASHED_BLOCK_BYTES:
                digest.update(content.data)
                continue
            last = len(content) - HASHED_BLOCK_BYTES
            for block in range(HASHED_BLOCKS):
                self._pages.note(1, HASHED_BLOCK_BYTES, self._tokens)
                start = last * block // (HASHED_BLOCKS - 1)
                digest.update(content[start : start + HASHED_BLOCK_BYTES].data)
        return digest.hexdigest()


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path} has changed since it was opened: shards in use must stay as they are; write new "
        "ones into another folder, and start or resume again"
    )


class _OpenFile:
    """Closes itself when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def shard_name(split: str, number: int, count: int) -> str:
    """File name, without suffix, of one shard of a split."""
    return split if count == 1 else f"{split}-{number:05d}-of-{count:05d}"


def resolve_prefixes(patterns: Iterable[str]) -> list[str]:
    """Shard prefixes that ``patterns`` stand for, in order.

    A pattern is a shard's prefix (``data/wap/train``), the prefix of a set (``data/web/train`` for
    ``train-00000-of-00004`` and so on, which must be complete), or a glob of prefixes. A
    ``.bin`` or ``.idx`` at its end is ignored.

    Raises:
        DataError: a pattern stands for nothing, or for a shard and a set at once, or a set is not
            complete.
    """
    found: list[str] = []
    for pattern in patterns:
        prefix = pattern.removesuffix(".idx").removesuffix(".bin")
        if Path(f"{prefix}.idx").is_file():
            if parts := _parts_of_set(prefix):
                raise DataError(
                    f"{prefix} names the shard {prefix}.idx and a set of shards, {parts[0]}.idx: "
                    "remove the one that is not wanted, or name files"
                )
            found.append(prefix)
            continue
        several = _complete_set(prefix)
        if not several:
            several = sorted(name.removesuffix(".idx") for name in glob.glob(f"{prefix}.idx"))
        if not several:
            raise DataError(f"no shards at {pattern}: {prefix}.idx does not exist{_nearby(prefix)}")
        found += several
    return found


def _parts_of_set(prefix: str) -> list[str]:
    return sorted(
        name.removesuffix(".idx")
        for name in glob.glob(f"{glob.escape(prefix)}-*.idx")
        if _PART_OF.fullmatch(name.removesuffix(".idx").removeprefix(prefix))
    )


def _complete_set(prefix: str) -> list[str]:
    names = _parts_of_set(prefix)
    if not names:
        return []
    counts = {name[-5:] for name in names}
    if len(counts) > 1:
        raise DataError(f"{prefix} names sets of {' and '.join(sorted(counts))} shards: keep one")
    count = int(counts.pop())
    missing = sorted({f"{prefix}-{n:05d}-of-{count:05d}" for n in range(count)} - set(names))
    if missing:
        raise DataError(f"{missing[0]}.idx is missing: {len(names)} of {count} shards are there")
    return names


def _nearby(prefix: str) -> str:
    folder = Path(prefix).parent
    names = sorted(path.stem for path in folder.glob("*.idx")) if folder.is_dir() else []
    return f"; {folder} has {', '.join(names[:5])}" if names else ""
