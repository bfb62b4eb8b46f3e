"""Text in, text out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.config import GenerationConfig
from megaegpt.errors import ConfigError
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.text_model import TextModel
from megaegpt.generation.trained import load_for_inference
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING, MemoryLimits
from megaegpt.parallel.grid import ProcessGrid
from tests.generation.test_trained import save_egpt, save_gpt
from tests.tiny.loaded import CONFIGS, load_speaking

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


def test_a_token_memory_holds_as_much_as_it_is_told_to(tmp_path: Path) -> None:
    gpt = save_gpt(tmp_path / "gpt")
    egpt = save_egpt(tmp_path / "egpt", gpt, like=CONFIGS["egpt_memory"])
    loaded = load_for_inference(egpt, ProcessGrid())
    text = "Well, Prince, so Genoa and Lucca are now just family estates. " * 4
    config = GenerationConfig(max_new_tokens=12, temperature=0.7, top_k=200, seed=3)
    prompt, written = loaded.tokenizer.encode_prompt(text), []
    for limits in (MemoryLimits(48, "int8"), AS_IN_TRAINING):
        generator = TextGenerator(loaded.model, loaded.encoder, 50257, limits=limits)
        (tokens,) = generator.generate([prompt], config, stop=loaded.tokenizer.end_tokens)
        written.append(loaded.tokenizer.decode(tokens))
    told = {"temperature": 0.7, "top_k": 200, "seed": 3}
    model = TextModel(loaded)
    found = model.generate(text, 12, **told, memory_tokens=48, memory_dtype="int8")
    assert found == written[0] != written[1]
    assert model.generate(text, 12, **told) == written[1]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"memory_tokens": 8}, "for an egpt with token_memory"),
        ({"memory_tokens": 0}, "memory_tokens must be at least 1, not 0"),
        ({"memory_dtype": "int4"}, "memory_dtype must be one of fp32, fp16, int8, not int4"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(asked, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TextModel(LOADED).generate("It", **asked)
