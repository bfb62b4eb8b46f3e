"""Byte-level BPE as vocabulary files spell it: every byte is a printable character (GPT-2's
alphabet), and merge rules are pairs of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence


def _byte_alphabet() -> dict[int, int]:
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: b for b in printable} | {256 + n: b for n, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
"""Character of a file -> byte: printable bytes are themselves, the others follow U+0100."""

CHARACTER_OF_BYTE = {byte: chr(code) for code, byte in BYTE_OF_CHARACTER.items()}


def spell(token: bytes) -> str:
    """A token as vocabulary files spell it."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)


def unspell(token: str) -> bytes | None:
    """The bytes of a token of a vocabulary file; None: it is not spelled in the alphabet."""
    try:
        return bytes(BYTE_OF_CHARACTER[ord(character)] for character in token)
    except KeyError:
        return None


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The merge rules, in order, that make each token of more than a byte, as tiktoken merges by
    rank: the two tokens left of it when only the rules before its own are applied.

    Args:
        tokens: by rank, which is their place.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    rules = (merge_rule(token, ranks) for token in tokens if len(token) > 1)
    return [rule for rule in rules if rule is not None]


def merge_rule(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that ``token`` is merged of when tokens of lower rank are made first; None: it
    is never made.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest == len(ranks):
            return None
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    first, second = parts
    return first, second
