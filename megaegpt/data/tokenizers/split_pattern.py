"""How a text is cut into words before bytes are merged: from Hugging Face's pre-tokenizers to one
regular expression that tiktoken runs.

tiktoken runs an expression without look-around as one automaton, at about twice the speed of one
that it has to try alternative after alternative. The only look-ahead of the expressions in use is
in their tail, which leaves the last blank of several to the word behind it; all before the tail
becomes one group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of Hugging Face's ``ByteLevel`` pre-tokenizer."""

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}"
QWEN2_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_MARKS}"
_CAPITALIZED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_IN_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_MARKS_AND_SLASHES = _MARKS.replace(r"[\r\n]*", r"[\r\n/]*", 1)
O200K_SPLIT = (
    rf"{_CAPITALIZED}{_CONTRACTIONS}?|{_IN_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"|{_MARKS_AND_SLASHES}"
)
TEKKEN_SPLIT = rf"{_CAPITALIZED}|{_IN_CAPITALS}|\p{{N}}|{_MARKS_AND_SLASHES}"

_TAIL = re.compile(r"\|\\s\+\(\?!\\S\)\|\\s\+?$")

_READ_ALIKE = re.compile(
    r"""(?:
      \\[pP]\{\w+\} | \\[rntsSz/.\-]                                  # classes, single characters
    | \[\^? (?: \\[pP]\{\w+\} | \\[rntsS/\\\-\[\]] | [^\\\[\]&] )+ \]
    | \(\?i?: | \(\?! | \( | \) | \|
    | (?: [?*+] | \{\d+(?:,\d*)?\} ) (?![?*+{])                       # neither lazy nor possessive
    | [^\\\[\](){}.^$|?*+]
    )*""",
    re.VERBOSE,
)
"""Expressions that the engines of Hugging Face and of tiktoken understand alike."""

_LATER_NUMBERS = r"\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
"""Numbers of Unicode 17, which ``Digits`` of the library knows and regular expressions do not."""


def split_expression(pre_tokenizer: Any) -> str | None:
    """The expression for tiktoken; None: there is none.

    Args:
        pre_tokenizer: of a ``tokenizer.json``.
    """
    first, *others = _parts(pre_tokenizer)
    byte_level = others[-1] if others else first
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        return None
    cuts_words = byte_level.get("use_regex", True)
    if not others and cuts_words:
        return _as_automaton(GPT2_SPLIT)
    if len(others) != 1:
        return None
    if first.get("type") == "Digits" and cuts_words:
        return _with_digits_apart("" if first.get("individual_digits") else "+")
    if first.get("type") == "Split" and not cuts_words:
        return _of_split(first)
    return None


def _parts(pre_tokenizer: Any) -> list[Mapping[str, Any]]:
    """The members of a sequence of pre-tokenizers; at least one."""
    if not isinstance(pre_tokenizer, dict):
        return [{}]
    if pre_tokenizer.get("type") != "Sequence":
        return [pre_tokenizer]
    members = pre_tokenizer.get("pretokenizers") or [{}]
    return [part for member in members for part in _parts(member)]


def _of_split(split: Mapping[str, Any]) -> str | None:
    pattern = split.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    how = (split.get("behavior"), bool(split.get("invert")))
    if how not in (("Isolated", False), ("Removed", True)) or not isinstance(expression, str):
        return None
    return _as_automaton(expression) if _READ_ALIKE.fullmatch(expression) else None


def _as_automaton(expression: str) -> str:
    r"""The same words, faster; without the known tail, the expression as it is.

    At the end of a text ``\s+(?!\S)`` takes all blanks, which ``\s+\z`` in the group does as well.
    Behind it ``\s+`` meets single blanks alone.
    """
    tail = _TAIL.search(expression)
    head = "" if tail is None else expression[: tail.start()]
    if not head or "(?!" in head:
        return expression
    return rf"(?:{head}|\s+\z)|\s+(?!\S)|\s"


def _with_digits_apart(repeated: str) -> str:
    r"""GPT-2's words in the texts between numbers: a run of blanks before a number ends its text,
    and so it is not cut before its last blank.
    """
    number = rf"\p{{N}}{_LATER_NUMBERS}"
    words = rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+| ?[^\s\p{{L}}{number}]+"
    return rf"(?:[{number}]{repeated}|{words}|\s+\z)|\s+(?![^\s{number}])|\s"
