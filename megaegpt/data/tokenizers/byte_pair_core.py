"""Byte-level BPE of any vocabulary on tiktoken's core, which is some ten times as fast as the
library ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tiktoken

from megaegpt.data.tokenizer import END_OF_TEXT, whole_characters

LONG_BLANK = 100_000
"""Regular expressions with a look-ahead give up on a million blanks in a row, by a panic."""


class BytePairCore:
    """Ids of texts without special tokens.

    Args:
        tokens: the bytes of each token by rank; every single byte is among them.
        ids: (len(tokens),) id of each rank, in the type that is wanted of ids.
        without_id: ranks below it have no id.
        expression: cuts texts into words, see :mod:`megaegpt.data.tokenizers.split_pattern`.
    """

    def __init__(
        self, tokens: Sequence[bytes], ids: np.ndarray, without_id: int, expression: str
    ) -> None:
        self._ids, self._without_id = ids, without_id
        self._encoding = tiktoken.Encoding(
            "byte-level BPE",
            pat_str=expression,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            # It looks for special tokens that it then takes for text; none at all would be found
            # at every character.
            special_tokens={END_OF_TEXT: len(tokens)},
        )

    def encode(self, text: str) -> np.ndarray | None:
        """Ids of ``text``; lone surrogates count as U+FFFD.

        None: it has bytes without an id, or a run of blanks that is too long for the expression.
        """
        if len(text) > LONG_BLANK and has_long_blank(text):
            return None
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(whole_characters(text))
        if self._without_id and len(ranks) and int(ranks.min()) < self._without_id:
            return None
        ids: np.ndarray = self._ids[ranks]
        return ids


def has_long_blank(text: str) -> bool:
    """Whether there may be a run of blanks that is too long: any run of two blocks' length covers
    one block whole.
    """
    blocks = range(0, len(text), LONG_BLANK)
    return any(text[start : start + LONG_BLANK].isspace() for start in blocks)
