"""Drawn tokens as text that ends before a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.generation.generator import TextAssembler


class TextStream:
    """The text of tokens as they come, held back where it may be the beginning of a stop text.

    Args:
        tokenizer: of the tokens.
        stops: texts that end it and are not part of it, none of them empty; a match is known as
            soon as it is whole, and of several the one that begins first counts.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._assembler = TextAssembler(tokenizer)
        self._stops = stops
        self._held = ""
        self.stopped = False
        """A stop text has come: nothing follows."""

    def add(self, token: int) -> str:
        """The text that is certain with this token, possibly none."""
        return self._certain(self._assembler.add(token))

    def end(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        text = self._certain(self._assembler.end()) + self._held
        self._held = ""
        return text

    def _certain(self, new: str) -> str:
        text = self._held + new
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
