"""Text in, text out."""

from __future__ import annotations

import pytest

from megaegpt.config import GenerationConfig
from megaegpt.errors import ConfigError
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.text_model import TextModel
from tests.tiny.loaded import load_speaking

LOADED = load_speaking("gpt")


def test_the_text_is_that_of_the_tokens_drawn_without_the_prompt() -> None:
    config = GenerationConfig(max_new_tokens=12, temperature=0.7, top_k=50, seed=3)
    prompt = LOADED.tokenizer.encode("Well, Prince,")
    generator = TextGenerator(LOADED.model, vocab_size=LOADED.tokenizer.vocab_size)
    (tokens,) = generator.generate([prompt], config, stop=LOADED.tokenizer.end_tokens)
    text = TextModel(LOADED).generate("Well, Prince,", 12, temperature=0.7, top_k=50, seed=3)
    assert text == LOADED.tokenizer.decode(tokens)


def test_pieces_come_as_they_are_drawn_and_are_the_text() -> None:
    model = TextModel(LOADED)
    pieces = list(model.stream("It was", 20, temperature=0))
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == model.generate("It was", 20, temperature=0)


def test_a_document_may_begin_from_nothing() -> None:
    assert TextModel(LOADED).generate("", 3)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        TextModel(LOADED).generate("It", temperature=-1)
