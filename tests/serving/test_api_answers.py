"""Answers in OpenAI's form."""

from __future__ import annotations

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.serving.api_answers import AnswerForm
from megaegpt.serving.batcher import TokenChoice


def test_offsets_are_of_whole_characters_and_parts_of_one_are_told_apart() -> None:
    tokenizer = Tokenizer.load()
    ids = tokenizer.encode("a\U0001f642b")
    assert len(ids) == 4  # the middle two are halves of a character
    form = AnswerForm("m", tokenizer, logprobs=True)
    halves = (8582, -2.0), (25081, -3.0)
    choices = [TokenChoice(token, -1.0, ((token, -1.0), *halves)) for token in ids]
    shown = form.whole("a\U0001f642b", choices, "stop", {})["choices"][0]["logprobs"]
    assert shown["text_offset"] == [0, 1, 1, 2]
    assert shown["tokens"] == ["a", "bytes:\\xf0\\x9f", "bytes:\\x99\\x82", "b"]
    assert [len(top) for top in shown["top_logprobs"]] == [3, 2, 2, 3]
