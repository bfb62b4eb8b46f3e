"""The work of a preprocessing worker: read a job's documents, clean them out, tokenise them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from megaegpt.data.preprocess.gigatoken import GigatokenEncoder
from megaegpt.data.preprocess.jobs import Content, Damage, LineSpan, Texts
from megaegpt.data.preprocess.progress import Counts
from megaegpt.data.preprocess.reader_jobs import CollectedProblems, Documents
from megaegpt.data.readers.inputs import (
    BYTE_ORDER_MARK,
    UTF_16_MARKS,
    UTF_16_MESSAGE,
    normalize_newlines,
    read_bytes,
)
from megaegpt.data.readers.json_lines import parse_object, text_of
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import DataError


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become tokens; the same for every worker."""

    text_key: str = "text"
    """Key of the text in a JSON object."""
    append_eod: bool = True
    """End every document with the end-of-text token."""
    min_chars: int = 0
    """Leave out documents of fewer characters."""
    hashes: bool = False
    """Give each document's hash, for splitting and for finding duplicates."""
    vocabulary: str | None = None
    """Place of the tokenizer; None: GPT-2's, which is installed."""
    backend: Literal["tiktoken", "gigatoken"] = "tiktoken"
    """The program that encodes; the ids are the same."""


@dataclass
class Problem:
    """A bad input."""

    path: str
    line: int | None
    """From 1, in the file or (of a :class:`LineSpan`) in the span; None: the whole file."""
    what: str


@dataclass
class Encoded:
    """The documents of a job, D of them.

    Attributes:
        tokens: ids of all documents back to back, end-of-text included.
        lengths: (D,) int64, tokens of each document.
        sizes: (D,) int64, UTF-8 bytes of each document.
        hashes: (D,) uint64, of the text; empty unless asked for.
        short: documents left out by ``min_chars``.
        problems: bad inputs in the order in which they were met.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    short: int = 0
    problems: list[Problem] = field(default_factory=list)

    def select(self, mask: np.ndarray) -> Encoded:
        """The documents where ``mask`` (D,) is true, without what was reported and left out."""
        if mask.all():
            return self
        return Encoded(
            self.tokens[np.repeat(mask, self.lengths)],
            self.lengths[mask],
            self.sizes[mask],
            self.hashes[mask],
        )

    def counts(self) -> Counts:
        """Documents, tokens and bytes."""
        return Counts(len(self.lengths), len(self.tokens), int(self.sizes.sum()))


class Encoder:
    """Documents of one job after the other, to tokens."""

    def __init__(self, options: EncodeOptions, tokenizer: Tokenizer | None = None) -> None:
        self.options = options
        loaded = tokenizer or Tokenizer.load(options.vocabulary)
        gigatoken = options.backend == "gigatoken"
        self.tokenizer = GigatokenEncoder(loaded) if gigatoken else loaded
        self._first = loaded.bos_token if loaded.adds_bos else None

    def __call__(self, content: Content) -> Encoded:
        """Read and tokenise a job. Bad input is listed, never raised.

        Raises:
            DataError: a file has changed or gone since the run was planned.
        """
        problems: list[Problem] = []
        texts: list[str] = []
        raw_texts: list[bytes] = []
        short = 0
        for path, line, text in _read(content, self.options.text_key, problems):
            try:
                raw = text.encode()
            except UnicodeEncodeError:
                what = "holds half of a surrogate pair, which is no character"
                problems.append(Problem(path, line, what))
                continue
            if len(text) < self.options.min_chars:
                short += 1
                continue
            texts.append(text)
            raw_texts.append(raw)
        tokens, lengths = self.tokenizer.encode_batch(texts)
        if self._first is not None:
            tokens, lengths = _with_each(tokens, lengths, self._first, at_end=False)
        if self.options.append_eod:
            tokens, lengths = _with_each(tokens, lengths, self.tokenizer.eot_token, at_end=True)
        hashed = raw_texts if self.options.hashes else []
        return Encoded(
            tokens,
            lengths,
            np.array([len(raw) for raw in raw_texts], np.int64),
            np.array([hash_of(raw) for raw in hashed], np.uint64),
            short,
            problems,
        )


def hash_of(text: bytes) -> int:
    """64 bits of a text's BLAKE2 digest: equal texts are equal, unequal ones differ in practice."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _with_each(
    tokens: np.ndarray, lengths: np.ndarray, token: int, *, at_end: bool
) -> tuple[np.ndarray, np.ndarray]:
    """``token`` put before or after each document."""
    longer = np.full(len(tokens) + len(lengths), token, tokens.dtype)
    keep = np.ones(len(longer), bool)
    ends = np.cumsum(lengths + 1)
    keep[ends - 1 if at_end else ends - (lengths + 1)] = False
    longer[keep] = tokens
    return longer, lengths + 1


def _read(
    content: Content, text_key: str, problems: list[Problem]
) -> Iterator[tuple[str, int | None, str]]:
    """File, line (None for a file that is one document) and text of each good document."""
    if isinstance(content, Texts):
        for path in content.paths:
            text = _read_text_file(path, problems)
            if text is not None:
                yield path, None, text
    elif isinstance(content, Documents):
        documents, found = content.finish()
        yield from ((place, None, text) for place, text in documents)
        problems.extend(Problem(place, None, what) for place, what in found)
    elif isinstance(content, Damage):
        problems.append(Problem(content.where, None, content.what))
    else:
        raw = _read_span(content) if isinstance(content, LineSpan) else content.content
        first_line = 1 if isinstance(content, LineSpan) else content.first_line
        at_start = content.start == 0 if isinstance(content, LineSpan) else first_line == 1
        if at_start and raw.startswith(UTF_16_MARKS):
            problems.append(Problem(content.path, None, UTF_16_MESSAGE))
            return
        if at_start:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        for line, text in _read_lines(content.path, raw, first_line, text_key, problems):
            yield content.path, line, text


def _read_lines(
    path: str, raw: bytes, first_line: int, text_key: str, problems: list[Problem]
) -> Iterator[tuple[int, str]]:
    collected = CollectedProblems()
    for number, line in enumerate(_lines(raw), first_line):
        if not line.strip():
            continue
        row = parse_object(line, "", collected)
        text = text_of(row, text_key, "", collected) if row is not None else None
        if text is not None:
            yield number, text
        else:
            problems.append(Problem(path, number, collected.found.pop()[1]))


def _lines(raw: bytes) -> Iterator[bytes]:
    """Lines with their ends; unlike ``splitlines``, a lone carriage return ends none."""
    start = 0
    while end := raw.find(b"\n", start) + 1:
        yield raw[start:end]
        start = end
    if start < len(raw):
        yield raw[start:]


def _read_span(span: LineSpan) -> bytes:
    try:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            raw = file.read(span.end - span.start)
    except OSError as error:
        raise DataError(f"cannot read {span.path}: {error.strerror}") from None
    if len(raw) < span.end - span.start:
        raise DataError(f"{span.path} has become shorter while it was read")
    return raw


def _read_text_file(path: str, problems: list[Problem]) -> str | None:
    try:
        raw = read_bytes(Path(path)).removeprefix(BYTE_ORDER_MARK)
    except DataError as error:
        problems.append(Problem(path, None, str(error).removeprefix(f"{path}: ")))
        return None
    if raw.startswith(UTF_16_MARKS):
        problems.append(Problem(path, None, UTF_16_MESSAGE))
        return None
    try:
        text = normalize_newlines(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(Problem(path, line, f"not UTF-8 at byte {error.start:,} of the file"))
        return None
    if not text.strip():
        problems.append(Problem(path, None, "the file is empty"))
        return None
    return text
