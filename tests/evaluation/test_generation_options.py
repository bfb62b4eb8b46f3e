"""What a task's generation options mean; held against the harness' own model in
``test_harness.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from megaegpt.config import GenerationConfig
from megaegpt.errors import ConfigError
from megaegpt.evaluation.generation_options import read_options

GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": None, "top_p": None}


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({}, {"max_new_tokens": 256, **GREEDY}),
        ({"do_sample": False, "temperature": 1, "top_k": 0}, {"max_new_tokens": 256, **GREEDY}),
        ({"temperature": "0.0", "max_gen_toks": "8"}, {"max_new_tokens": 8, **GREEDY}),
        ({"max_new_tokens": 4, "num_beams": 1}, {"max_new_tokens": 4, **GREEDY}),
        ({"max_tokens": 4, "max_gen_toks": 5}, {"max_new_tokens": 5, **GREEDY}),
        (
            {"temperature": 0.7, "max_gen_toks": 1},
            {"max_new_tokens": 1, "temperature": 0.7, "top_k": 50, "top_p": 1.0},
        ),
        (
            {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
            {"max_new_tokens": 256, "temperature": 1.0, "top_k": None, "top_p": 0.9},
        ),
        (
            {"do_sample": True, "temperature": 1.0, "top_p": 0},
            {"max_new_tokens": 256, "temperature": 1.0, "top_k": 1, "top_p": 1.0},
        ),
    ],
)
def test_options_are_read_as_the_harness_reads_them(
    options: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert read_options(options).config == GenerationConfig(**meant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 10}, "only num_beams=1"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6, which is not offered; known are max_gen_toks"),
        ({"do_sample": True}, "without a temperature above 0"),
        ({"do_sample": "yes"}, "do_sample='yes': it must be true or false"),
        ({"temperature": "warm"}, "temperature='warm': it must be a number"),
        ({"until": 3}, "until=3: it must be a text or a list of texts"),
    ],
)
def test_what_cannot_be_done_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(options)


def test_a_text_ends_at_the_first_of_its_ends_wherever_its_pieces_were_cut() -> None:
    options = read_options({"until": ["\n\n", "Q:"]})
    assert options.until == ("\n\n", "Q:", "<|endoftext|>")
    text = ""
    for piece in ("A", " b\n", "c", "Q", ": no"):
        assert not options.ends(text, len(text))
        text += piece
        if options.ends(text, len(piece)):
            break
    assert text == "A b\ncQ: no"
    assert options.cut(text) == "A b\nc"
    assert options.cut("all of it") == "all of it"
    assert read_options({"until": "."}).until == (".", "<|endoftext|>")
