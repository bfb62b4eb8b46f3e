"""The interface of a tokenizer to the rest of the package: ids of a text, bytes of ids, what ends a
document, and a fingerprint to tell it from others.

The implementations are in :mod:`megaegpt.data.tokenizers`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.config.model import VOCABULARY_MULTIPLE
from megaegpt.errors import DataError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
"""GPT-2's."""

_FEWEST_IDS_OF_INT32 = 65_500


class Tokenizer(ABC):
    """Text to ids and back. All text is ordinary: the name of a special token, such as
    ``<|endoftext|>``, is just characters, unless :meth:`encode_with_special_tokens` is asked.

    Attributes:
        name: for people and manifests.
        vocab_size: number of ids, special ones included: the largest id and 1.
        eot_token: the id that ends a document.
        bos_token: the id that is named as the begin of a text; None: none is.
        adds_bos: ``bos_token`` is put before every text, by the tokenizer's own rule. Ids of a text
            are without it: whoever has a whole text, and not a part of one, asks for
            :meth:`encode_prompt`.
        special_tokens: names and ids of those that stand for no text.
        fingerprint: sha256 over everything that decides the ids of a text.
        runs_on: what computes the ids.
        chat_template: Jinja that came with it; None: nothing did.
        is_installed: it comes with the program; the files of others go with shards and weights.
    """

    name: str
    vocab_size: int
    eot_token: int
    special_tokens: Mapping[str, int]
    runs_on: str
    bos_token: int | None = None
    adds_bos = False
    chat_template: str | None = None
    is_installed = False

    @staticmethod
    def load(vocabulary: str | Path | None = None) -> Tokenizer:
        """:func:`~megaegpt.data.tokenizers.tokenizer_files.load_tokenizer`, by its other name.

        Raises:
            DataError: there is no tokenizer, or it is damaged or of a kind that cannot be used.
        """
        from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer

        return load_tokenizer(vocabulary)

    # -- what an implementation has ----------------------------------------------------------------

    @property
    @abstractmethod
    def fingerprint(self) -> str: ...

    @abstractmethod
    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of ``text`` as ``dtype``; lone surrogates count as U+FFFD."""

    @property
    @abstractmethod
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each id; special tokens stand for none."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Names and contents of the files that Hugging Face's ``AutoTokenizer`` and :meth:`load`
        read, that of the vocabulary first.
        """

    # -- what follows from it ----------------------------------------------------------------------

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of ids in arrays and shards: uint16, and int32 from 65,500 ids on, as Megatron-LM and
        GPT-NeoX have it.
        """
        return np.dtype(np.uint16 if self.vocab_size < _FEWEST_IDS_OF_INT32 else np.int32)

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to the rows of an embedding."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids at which a model stops to write; ``eot_token`` is one of them."""
        return frozenset({self.eot_token})

    @property
    def first_token(self) -> int:
        """What is before a text: ``bos_token`` by the tokenizer's own rule, else the id that ended
        another.
        """
        adds = self.adds_bos and self.bos_token is not None
        return self.bos_token if adds and self.bos_token is not None else self.eot_token

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the first part of a text, behind ``bos_token`` where that is the rule; without
        text, what is before a new one.
        """
        ids = self.encode(text)
        return [self.first_token, *ids] if self.adds_bos or not ids else ids

    @cached_property
    def end_of_text(self) -> str:
        """The name of ``eot_token``."""
        return next(name for name, token in self.special_tokens.items() if token == self.eot_token)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; lone surrogates count as U+FFFD."""
        return self.encode_numpy(text).tolist()

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Ids of ``text`` in which the names of special tokens are these tokens; where names begin
        alike the longest one counts.
        """
        ids: list[int] = []
        for part, token in self.split_special_tokens(text):
            ids += self.encode_part(part, is_first=not ids) if token is None else [token]
        return ids

    def split_special_tokens(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The parts of ``text``, one after the other: names of special tokens with their ids, and
        what is between them with None.
        """
        for number, part in enumerate(self._special_names.split(text)):
            if number % 2:
                token = self.special_tokens.get(part)
                yield part, self.special_tokens[part.strip()] if token is None else token
            elif part:
                yield part, None

    def encode_part(self, text: str, is_first: bool) -> list[int]:
        """Ids of what is between special tokens, or of the first part of a text before any."""
        return self.encode(text)

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        """Names of special tokens as they are found in a text: in a group each, white space that
        belongs to them included.
        """
        names = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @property
    def template_variables(self) -> dict[str, str]:
        """Names of special tokens by the words that chat templates have for them: ``bos_token``,
        ``eos_token``.
        """
        known = {token: name for name, token in self.special_tokens.items()}
        named = {"bos_token": self.bos_token, "eos_token": self.eot_token}
        return {kind: known[token] for kind, token in named.items() if token in known}

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back (``dtype``), and how many each text has (int64)."""
        rows = [self.encode_numpy(text) for text in texts]
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        return np.concatenate([np.empty(0, self.dtype), *rows]), lengths

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; special tokens give their names.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        shown, size = self._shown_bytes, self.vocab_size
        parts = []
        for token in map(int, ids):
            if not 0 <= token < size:
                raise DataError(f"a token id is outside the vocabulary of {size}: {token}")
            parts.append(shown[token])
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; a character cut in two becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def _shown_bytes(self) -> list[bytes]:
        shown = list(self.token_bytes)
        for name, token in self.special_tokens.items():
            shown[token] = name.encode()
        return shown

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """int32 of shape (vocab_size,): bytes of text an id stands for; 0 for special tokens."""
        return np.fromiter(map(len, self.token_bytes), np.int32, self.vocab_size)


def whole_characters(text: str) -> str:
    """``text`` with U+FFFD in place of lone surrogates, which no encoding of bytes has."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
