"""Byte-level BPE by the package ``gigatoken``: tiktoken's ids at about ten times its speed.

It is optional and trusted only as far as it is checked: a piece of every batch is encoded by
tiktoken too, and a difference stops the run. Its cache of words has no bound of its own, so the
encoder is built anew whenever the process has grown by 128 MiB.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.gpt2_tokenizer import GPT2Tokenizer
from megaegpt.errors import DataError, first_line

MAX_GROWTH_BYTES = 128 << 20
"""Growth of the process, in bytes, after which the encoder is built anew to empty its cache."""

_CHECKED_CHARACTERS = 2000
_STATM = Path("/proc/self/statm")
_TEXT_PER_ENCODER = 256 << 20  # characters, where the process' size cannot be read


class GigatokenEncoder:
    """The part of :class:`Tokenizer` that preprocessing needs, on another engine.

    Args:
        tokenizer: whose vocabulary is used, and whose ids are the truth.

    Raises:
        DataError: the package is not installed, or cannot run this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eot_token = tokenizer.eot_token
        self._batches = 0
        self._build()

    def _build(self) -> None:
        self._encoder = build_bpe_encoder(self._tokenizer)
        self._base_size = resident_bytes()
        self._characters = 0

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back, in the tokenizer's type, and how many belong to each text
        (int64).

        Raises:
            DataError: the ids are not tiktoken's.
        """
        if self._has_grown():
            self._build()
        rows = [self._encoder.encode(text) for text in texts]
        if texts:
            self._check(texts[self._batches % len(texts)])
        self._batches += 1
        self._characters += sum(map(len, texts))
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        tokens = np.empty(int(lengths.sum()), self._tokenizer.dtype)
        np.concatenate([tokens[:0], *rows], out=tokens, casting="unsafe")
        return tokens, lengths

    def _check(self, text: str) -> None:
        """The ids of some of ``text`` against tiktoken's; another part of it every time."""
        first = self._batches * _CHECKED_CHARACTERS % max(1, len(text) - _CHECKED_CHARACTERS)
        piece = text[first : first + _CHECKED_CHARACTERS]
        if self._encoder.encode(piece).tolist() != self._tokenizer.encode(piece):
            raise DataError(
                "gigatoken and tiktoken disagree on the tokens of "
                f"{piece[:40]!r}...: use --tokenizer-backend tiktoken"
            )

    def _has_grown(self) -> bool:
        if self._base_size is None:
            return self._characters > _TEXT_PER_ENCODER
        return (resident_bytes() or 0) - self._base_size > MAX_GROWTH_BYTES


def build_bpe_encoder(tokenizer: Tokenizer) -> Any:
    """gigatoken's encoder of the same vocabulary: ``encode(text)`` gives ids, uint32 of shape (n,).

    Raises:
        DataError: the package is not installed.
    """
    try:
        from gigatoken.gigatoken_rs import BPETokenizer
    except ImportError:
        raise DataError(
            "--tokenizer-backend gigatoken needs the package: pip install gigatoken==0.10.0"
        ) from None
    # No special tokens: the name of one in a document is ordinary text, as with tiktoken.
    if isinstance(tokenizer, GPT2Tokenizer):
        with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:
            for rank, token in enumerate(tokenizer.token_bytes[: tokenizer.eot_token]):
                file.write(base64.b64encode(token) + b" %d\n" % rank)
            file.flush()
            return BPETokenizer.from_tiktoken(file.name, "gpt2", {})
    content = json.loads(tokenizer.files()["tokenizer.json"])
    added = content.get("added_tokens", [])
    content["added_tokens"] = [token for token in added if not token.get("special")]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        try:
            return BPETokenizer.from_hf(file.name)
        except RuntimeError as error:
            raise DataError(
                f"gigatoken cannot run the tokenizer {tokenizer.name} ({first_line(error)}): use "
                "--tokenizer-backend tiktoken"
            ) from None


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell it."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
