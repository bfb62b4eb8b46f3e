"""Conversations of a system, a user and an assistant, as OpenAI and ShareGPT write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megaegpt.errors import DataError

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""OpenAI's names of the roles and ShareGPT's."""

_SHAPES = (("messages", "role", "content"), ("conversations", "from", "value"))
"""Keys of OpenAI's records and of ShareGPT's: the list, a speaker, a text."""


@dataclass(frozen=True)
class Message:
    """What one of them says at once."""

    role: Role
    content: str
    learned: bool = True
    """False: an assistant's message that is not to be learned (``"weight": 0`` in a record)."""

    def as_dict(self) -> dict[str, str]:
        """As chat templates read it."""
        return {"role": self.role, "content": self.content}


Conversation = tuple[Message, ...]


def is_conversation(record: Mapping[str, Any]) -> bool:
    """Whether a record of a file is a conversation, of whichever shape."""
    return any(isinstance(record.get(key), list) for key, _, _ in _SHAPES)


def parse_conversation(record: Mapping[str, Any]) -> Conversation:
    """The messages of ``{"messages": [{"role", "content"}]}`` or ``{"conversations": [{"from",
    "value"}]}``.

    Raises:
        DataError: it is neither, or a message is none.
    """
    for key, role, content in _SHAPES:
        if isinstance(record.get(key), list):
            return parse_messages(record[key], key, role, content)
    raise DataError('needs the list "messages" or "conversations"')


def parse_messages(
    messages: Sequence[Any],
    key: str = "messages",
    role_key: str = "role",
    content_key: str = "content",
) -> Conversation:
    """Check a list of messages: texts, or lists of text parts as OpenAI's interface has them.

    Raises:
        DataError: the list is empty, or a message has no known role or no text.
    """
    if not messages:
        raise DataError(f"{key} is empty")
    found = []
    for number, message in enumerate(messages):
        where = f"{key}[{number}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{where} is a JSON {type(message).__name__}, not an object")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(
                f"{where}.{role_key} is {role!r:.40}, not one of system, user and assistant"
            )
        if message.get("tool_calls") or message.get("function_call"):
            raise DataError(f"{where} calls a tool, and calls are not supported")
        text = _text_of(message.get(content_key))
        if text is None:
            raise DataError(f"{where}.{content_key} is no text")
        found.append(Message(_ROLES[role], text, message.get("weight", 1) != 0))
    return tuple(found)


def _text_of(content: Any) -> str | None:
    """A text, or the texts of a list of parts one after the other; None: it is something else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)
