"""Texts that join and leave a running batch: each is what it is alone."""

from __future__ import annotations

import random

import pytest
import torch

from megaegpt.config import ModelConfig
from megaegpt.generation.recomputing import RecomputingDecoder
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING
from megaegpt.serving.running_rows import BatchedRows, new_rows
from tests.generation.test_padded import GPTS
from tests.tiny.models import DEEPGPT, EGPT, GPT, MAX_LEN, build_with_encoder, prompt

CONFIGS = {
    name: GPTS[name] for name in ("gpt", "gpt_latent", "gpt_window_every", "gpt_documents_0")
}
CONFIGS |= {"egpt": EGPT, "deepgpt": DEEPGPT}


class Text:
    """One text, fed token by token, and the logits that came back."""

    def __init__(self, seed: int, prompt_length: int, length: int) -> None:
        self.tokens = prompt(length, seed)
        self.fed = prompt_length
        self.logits: list[torch.Tensor] = []


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_the_logits_of_every_text_are_those_of_the_text_alone(name: str) -> None:
    """Texts of random lengths come and go at random times, through several fills of the columns."""
    model, encoder = build_with_encoder(CONFIGS[name])
    rows = new_rows(model, encoder, 3, None, AS_IN_TRAINING)
    draw = random.Random(5)
    running: list[Text] = []
    texts = []
    for _ in range(12 * MAX_LEN):
        if len(rows) < rows.most and len(texts) < 12 and draw.random() < 0.4:
            length = draw.choice([2, 3, MAX_LEN // 2, MAX_LEN])
            text = Text(len(texts), draw.randrange(1, length), length)
            reading = rows.read(text.fed, length - text.fed)
            for piece in torch.tensor([text.tokens[: text.fed]]).split(5, dim=1):
                logits = reading.advance(piece)
            text.logits.append(logits[0])
            rows.join(reading)
            running.append(text)
            texts.append(text)
        for row in reversed(range(len(running))):
            if running[row].fed == len(running[row].tokens):
                rows.leave(row)
                running[row] = running[-1]
                running.pop()
        if running:
            new = rows.advance([text.tokens[text.fed] for text in running])
            for text, logits in zip(running, new, strict=True):
                text.fed += 1
                text.logits.append(logits)
    assert len(texts) == 12
    assert not running
    assert len(rows) == 0
    for text in texts:
        first = len(text.tokens) - len(text.logits) + 1
        for number in {0, 1, len(text.logits) // 2, len(text.logits) - 1}:
            seen = torch.tensor([text.tokens[: first + number]])
            expected = RecomputingDecoder(model, encoder).advance(seen)[0]
            torch.testing.assert_close(text.logits[number], expected, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_what_a_text_leaves_that_is_not_finite_reaches_no_other() -> None:
    model, encoder = build_with_encoder(GPT)
    rows = BatchedRows(model, 2, MAX_LEN)
    healthy = rows.read(3, 9)
    healthy.advance(torch.tensor([prompt(3, 1)]))
    bad = rows.read(3, 9)
    bad.advance(torch.tensor([prompt(3, 2)]))
    for store in bad.cache.stores():  # type: ignore[attr-defined]
        for tensor in store:
            tensor.fill_(torch.nan)
    rows.join(healthy)
    rows.join(bad)
    assert not rows.advance([1, 1])[1].isfinite().any()
    rows.leave(1)
    rows.advance([1])
    text = prompt(4, 3)
    after = rows.read(3, 9)
    after.advance(torch.tensor([text[:3]]))
    rows.join(after)
    found = rows.advance([1, text[3]])[1]
    expected = RecomputingDecoder(model, encoder).advance(torch.tensor([text]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_cache_is_bounded_by_the_rows_and_their_context() -> None:
    model, _ = build_with_encoder(GPT)
    small, large = BatchedRows(model, 2, MAX_LEN), BatchedRows(model, 4, MAX_LEN)
    assert small.cache_bytes * 2 == large.cache_bytes
    with pytest.raises(ValueError, match=f"{MAX_LEN}"):
        small.read(MAX_LEN, 1)


def test_columns_that_no_text_sees_any_more_are_not_read() -> None:
    """A short text beside which a long one has ended costs what it costs alone."""
    model, _ = build_with_encoder(GPT)
    widths: list[int] = []
    rows = BatchedRows(model, 2, MAX_LEN)
    for length in (MAX_LEN - 1, 1):
        reading = rows.read(length, 1)
        reading.advance(torch.tensor([prompt(length)]))
        rows.join(reading)
    rows.leave(0)
    hidden_states = model.hidden_states

    def counting(tokens: torch.Tensor, cache: object, *rest: object) -> torch.Tensor:
        widths.append(cache.length)
        return hidden_states(tokens, cache, *rest)

    model.hidden_states = counting
    rows.advance([1])
    assert widths == [1]


def test_the_context_may_be_less_than_the_models() -> None:
    model, encoder = build_with_encoder(GPT)
    assert isinstance(model.config, ModelConfig)
    assert new_rows(model, encoder, 1, 7, AS_IN_TRAINING).context == 7
    assert new_rows(model, encoder, 1, None, AS_IN_TRAINING).context == MAX_LEN
