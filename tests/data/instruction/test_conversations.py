"""Conversations in OpenAI's and ShareGPT's shapes."""

from __future__ import annotations

from typing import Any

import pytest

from megaegpt.data.instruction.conversations import Message, is_conversation, parse_conversation
from megaegpt.errors import DataError


def test_openai_and_sharegpt_records_give_the_same_messages() -> None:
    openai = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
            },
            {"role": "assistant", "content": "Hi."},
        ]
    }
    sharegpt = {
        "id": "x",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi."},
        ],
    }
    wanted = (
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi."),
    )
    assert parse_conversation(openai) == parse_conversation(sharegpt) == wanted
    assert is_conversation(openai)
    assert not is_conversation({"instruction": "a", "messages": None})


def test_a_message_of_weight_0_is_not_learned() -> None:
    record = {"messages": [{"role": "assistant", "content": "a", "weight": 0}]}
    assert not parse_conversation(record)[0].learned


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, 'needs the list "messages" or "conversations"'),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["a"]}, r"messages\[0\] is a JSON str"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\].role is 'tool'"),
        ({"messages": [{"content": "a"}]}, "role is None"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is no text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "calls a tool"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(
    record: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        parse_conversation(record)
