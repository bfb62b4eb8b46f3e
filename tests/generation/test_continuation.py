"""Prompts that grow are continued as they are from the beginning, and read once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megaegpt.errors import NotFiniteError
from megaegpt.generation.continuation import Continuation
from megaegpt.generation.generator import TextGenerator
from tests.tiny.models import DEEPGPT, EGPT, GPT, MAX_LEN, SAMPLING, build_with_encoder, prompt

CONFIG = replace(SAMPLING, max_new_tokens=5)


@pytest.mark.parametrize("config", [GPT, EGPT, DEEPGPT], ids=lambda config: config.kind)
def test_every_continuation_is_the_one_from_the_beginning(config) -> None:
    """Of a text that grows past the context, of one that does not begin alike, and after a text
    that was left in its middle."""
    model, encoder = build_with_encoder(config)
    writer = Continuation(model, encoder, config.vocab_size)
    text = prompt(3)
    for turn in range(8):
        (expected,) = TextGenerator(model, encoder).generate([text], CONFIG)
        stream = writer.stream(text, CONFIG)
        found = [token for token, _ in zip(stream, range(5 - turn % 2), strict=False)]
        assert found == expected[: len(found)]
        text = prompt(4, seed=9) if turn == 5 else [*text, *found, *prompt(4, seed=turn)]
    assert turn == 7


def test_what_was_read_is_not_read_again() -> None:
    model, _ = build_with_encoder(GPT)
    read: list[int] = []
    model.stack.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    writer = Continuation(model, None, GPT.vocab_size)
    text = prompt(MAX_LEN // 2)
    answer = list(writer.stream(text, replace(CONFIG, max_new_tokens=2)))
    assert read == [MAX_LEN // 2, 1]
    read.clear()
    list(writer.stream([*text, *answer, 3], replace(CONFIG, max_new_tokens=1)))
    assert read == [2]  # the answer's last token, which nothing had followed, and the new one
    read.clear()
    list(writer.stream(text, replace(CONFIG, max_new_tokens=1)))
    assert read == [MAX_LEN // 2]


def test_a_step_that_was_interrupted_spoils_nothing() -> None:
    model, _ = build_with_encoder(GPT)
    writer = Continuation(model, None, GPT.vocab_size)
    text = prompt(3)
    expected = list(writer.stream(text, CONFIG))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    stream = writer.stream(text, CONFIG)
    next(stream)
    last_block = list(model.stack.children())[-1]
    hook = last_block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    hook.remove()
    assert list(writer.stream(text, CONFIG)) == expected


def test_a_model_without_probabilities_writes_nothing() -> None:
    model, _ = build_with_encoder(GPT)
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        next(Continuation(model, None, GPT.vocab_size).stream(prompt(3), CONFIG))


def test_stop_ids_end_it() -> None:
    model, _ = build_with_encoder(GPT)
    text = list(Continuation(model, None, GPT.vocab_size).stream(prompt(3), CONFIG))
    stopped = Continuation(model, None, GPT.vocab_size).stream(prompt(3), CONFIG, stop={text[2]})
    assert list(stopped) == text[: text.index(text[2])]
    assert torch.is_grad_enabled()


def test_a_text_is_no_longer_than_memory_was_asked_for() -> None:
    model, _ = build_with_encoder(GPT)
    writer = Continuation(model, None, GPT.vocab_size, max_tokens=8)
    expected = list(Continuation(model, None, GPT.vocab_size).stream(prompt(3), CONFIG))
    assert list(writer.stream(prompt(3), CONFIG)) == expected
    with pytest.raises(ValueError, match="4 and 5 tokens are more than 8"):
        next(writer.stream(prompt(4), CONFIG))
