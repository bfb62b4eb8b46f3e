"""Conversations that fit into a context."""

from __future__ import annotations

import pytest

from megaegpt.data.instruction.chat_template import load_chat_template
from megaegpt.data.instruction.conversations import Message
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import DataError
from megaegpt.generation.chat import Chat

TOKENIZER = Tokenizer.load()
SYSTEM = Message("system", "Be brief.")
TURNS = tuple(
    Message(role, f"{word} " * 10)
    for word in ("one", "two", "three")
    for role in ("user", "assistant")
)[:-1]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(TOKENIZER, load_chat_template(TOKENIZER, "alpaca"))


def test_what_fits_is_left_whole(chat: Chat) -> None:
    conversation = (SYSTEM, *TURNS)
    ids = chat.encode(conversation)
    for most in (None, len(ids)):
        assert chat.encode_newest(conversation, most) == (ids, 0)


def test_the_oldest_turns_go_and_the_system_message_stays(chat: Chat) -> None:
    ids = chat.encode((SYSTEM, *TURNS))
    left = chat.encode((SYSTEM, *TURNS[2:]))
    assert chat.encode_newest((SYSTEM, *TURNS), len(ids) - 1) == (left, 2)
    last = chat.encode((SYSTEM, *TURNS[4:]))
    assert chat.encode_newest((SYSTEM, *TURNS), len(last)) == (last, 4)
    assert chat.encode_newest(TURNS, len(chat.encode(TURNS[4:]))).dropped == 4


def test_a_message_that_does_not_fit_by_itself_is_refused(chat: Chat) -> None:
    with pytest.raises(DataError, match=r"has \d+ tokens of the 9 that fit"):
        chat.encode_newest(TURNS, 9)


def test_an_answer_ends_where_the_template_ends_it(chat: Chat) -> None:
    assert chat.end_tokens == {TOKENIZER.eot_token}
    assert chat.end_texts == ()


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_where_its_end_is_no_token_an_answer_ends_before_the_text_of_it(
    name: str, end: str
) -> None:
    without = Chat(TOKENIZER, load_chat_template(TOKENIZER, name))
    assert without.end_texts == (end,)
    assert without.end_tokens == {TOKENIZER.eot_token}
