"""Prompts of different lengths in one batch: each row is the text that it is alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import megaegpt.model.gpt as gpt_module
from megaegpt.config import ModelConfig
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.padded import PaddedGPTDecoder
from megaegpt.model.decoding import GPTDecoder
from tests.distributed.harness import Distributed, grid_for
from tests.generation.test_generator import VARIANTS
from tests.tiny.models import GPT, MAX_LEN, SAMPLING, build_with_encoder, prompt

GPTS = {name: config for name, config in VARIANTS.items() if config.kind == "gpt"}
GPTS["gpt_window_every"] = replace(GPT, positions="rotary", window=3, window_every=2)
GPTS["gpt_documents_0"] = replace(GPT, document_end=0)  # also the id that fills up the rows
GPTS["gpt_one_token_seen"] = replace(GPT, max_seq_len=1)
LENGTHS = (3, MAX_LEN, 1, 9, 3, MAX_LEN + 1, 5 * MAX_LEN // 2)


def _gpt(config: ModelConfig) -> gpt_module.GPT:
    model, _ = build_with_encoder(config)
    assert isinstance(model, gpt_module.GPT)
    return model


@pytest.mark.parametrize("name", GPTS)
@torch.inference_mode()
def test_the_logits_of_every_row_are_those_of_the_row_alone(name: str) -> None:
    """Through several full contexts, each row's at steps of its own."""
    model, new = _gpt(GPTS[name]), 4 * MAX_LEN
    texts = [prompt(length + new, seed) for seed, length in enumerate(LENGTHS)]
    together = PaddedGPTDecoder(model, LENGTHS, new)
    alone = [GPTDecoder(model, 1, len(text)) for text in texts]
    longest = max(LENGTHS)
    for step in range(new):
        first = [0 if step == 0 else length + step - 1 for length in LENGTHS]
        pieces = [t[a : n + step] for t, a, n in zip(texts, first, LENGTHS, strict=True)]
        width = longest if step == 0 else 1
        rows = torch.tensor([[0] * (width - len(piece)) + piece for piece in pieces])
        logits = together.advance(rows)
        expected = [d.advance(torch.tensor([p])) for d, p in zip(alone, pieces, strict=True)]
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unequal_prompts_are_one_batch_and_each_text_is_the_one_written_alone(
    temperature: float,
) -> None:
    model = _gpt(GPT)
    rows = []
    model.stack.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    config = replace(SAMPLING, temperature=temperature, max_new_tokens=3)
    prompts = [prompt(length, seed) for seed, length in enumerate((2, 7, 4))]
    TextGenerator(model).generate(prompts, config)
    assert rows == [3, 3, 3]
    config = replace(config, max_new_tokens=3 * MAX_LEN)
    texts = TextGenerator(model).generate(prompts, config, seeds=[8, 1, 8])
    for one, text, seed in zip(prompts, texts, (8, 1, 8), strict=True):
        assert TextGenerator(model).generate([one], replace(config, seed=seed)) == [text]


def test_a_row_that_has_ended_changes_no_other() -> None:
    model = _gpt(GPT)
    prompts = [prompt(length, seed) for seed, length in enumerate((2, 7, 4))]
    config = replace(SAMPLING, max_new_tokens=2 * MAX_LEN)
    free = TextGenerator(model).generate(prompts, config)
    stop = free[1][3]
    expected = [text[: text.index(stop)] if stop in text else text for text in free]
    assert TextGenerator(model).generate(prompts, config, stop={stop}) == expected


def test_what_is_allocated_is_bounded_by_the_context_and_not_by_the_tokens_asked_for() -> None:
    model = _gpt(GPT)
    for decoder in (GPTDecoder(model, 2, 10**15), PaddedGPTDecoder(model, [1, 2], 10**15)):
        assert decoder.advance(torch.zeros(2, 2, dtype=torch.int64)).shape[0] == 2


def _texts_at(tp_size: int) -> list[list[int]]:
    model, _ = build_with_encoder(GPT, grid_for(tp_size))
    prompts = [prompt(length, seed) for seed, length in enumerate((2, 7, 4))]
    return TextGenerator(model).generate(prompts, replace(SAMPLING, max_new_tokens=30))


def test_tensor_parallel_ranks_write_the_texts_of_one(distributed: Distributed) -> None:
    alone = _texts_at(1)
    assert distributed(2, _texts_at, 2) == [alone, alone]
