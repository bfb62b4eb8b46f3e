"""Text of tokens up to a stop text, whatever the pieces that it comes in."""

from __future__ import annotations

import pytest

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.serving.text_stream import TextStream

TOKENIZER = Tokenizer.load()


def pieces(text: str, stops: list[str]) -> tuple[list[str], bool]:
    """What comes with each byte of a text, and with its end."""
    stream = TextStream(TOKENIZER, stops)
    by_byte = [TOKENIZER.token_bytes.index(bytes([byte])) for byte in text.encode()]
    shown = []
    for token in by_byte:
        shown.append(stream.add(token))
        if stream.stopped:
            break
    return [*shown, stream.end()], stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one two", [], "one two"),
        ("one two", ["three"], "one two"),
        ("one two", [" two"], "one"),
        ("one two", ["two", "ne"], "o"),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("héllo é", ["é"], "h"),
        ("héllo", ["llö"], "héllo"),
        ("one", ["one"], ""),
        ("half a sto", ["stop"], "half a sto"),
    ],
)
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str], shown: str) -> None:
    found, stopped = pieces(text, stops)
    assert "".join(found) == shown
    assert stopped == (shown != text)


def test_only_what_may_be_a_stop_text_is_held_back() -> None:
    assert pieces("a\n\nb\nc", ["\n\n\n"])[0] == ["a", "", "", "\n\nb", "", "\nc", ""]


def test_a_character_that_is_cut_off_is_shown_as_one_that_is_not_known() -> None:
    stream = TextStream(TOKENIZER, ["stop"])
    assert stream.add(TOKENIZER.token_bytes.index(b"\xc3")) == ""
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"
