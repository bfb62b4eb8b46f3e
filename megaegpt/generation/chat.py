"""Conversations as prompts of a model: by its chat template, within its context."""

from __future__ import annotations

from typing import NamedTuple

from megaegpt.data.instruction.chat_template import ChatTemplate, load_chat_template
from megaegpt.data.instruction.conversations import Conversation
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import DataError
from megaegpt.generation.trained import LoadedModel


class FittingPrompt(NamedTuple):
    """A prompt, and how many messages of the conversation it leaves out."""

    ids: list[int]
    dropped: int


class Chat:
    """A chat template with the tokenizer that its conversations are written in.

    Args:
        tokenizer: of the model.
        template: that the model was taught with.

    Raises:
        DataError: the template cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        self.end_tokens = template.end_tokens(tokenizer)
        """Ids that end an answer."""
        end = template.end_text(tokenizer)
        self.end_texts = (end,) if end else ()
        """Texts that end one and are no part of it."""

    def encode(self, messages: Conversation) -> list[int]:
        """Ids of a conversation, up to where the answer to it begins.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._template.encode_prompt(messages, self._tokenizer)

    def encode_newest(self, messages: Conversation, most_tokens: int | None) -> FittingPrompt:
        """The same without the oldest turns, where there are more than ``most_tokens`` ids. A
        system message that comes first stays, and so does the last message.

        Raises:
            DataError: what must stay is too long, or the template refuses what is left.
        """
        head = messages[:1] if messages[0].role == "system" else ()
        turns = messages[len(head) :]
        dropped = 0
        while True:
            ids = self.encode((*head, *turns))
            if most_tokens is None or len(ids) <= most_tokens:
                return FittingPrompt(ids, dropped)
            # A turn is all from one message of the user to before the next.
            later = [n for n, message in enumerate(turns) if n and message.role == "user"]
            if not later:
                raise DataError(
                    f"the message is too long: with what comes before it, it has {len(ids)} tokens "
                    f"of the {most_tokens} that fit"
                )
            turns, dropped = turns[later[0] :], dropped + later[0]


def find_chat(loaded: LoadedModel, wanted: str | None = None) -> Chat | None:
    """How a model is talked to; None where it came without a chat template and none is wanted.

    Args:
        wanted: the name of a template, or its file, in place of the model's own.

    Raises:
        DataError: the template cannot be used.
    """
    if wanted is not None:
        return Chat(loaded.tokenizer, load_chat_template(loaded.tokenizer, wanted))
    if loaded.chat_template is None:
        return None
    return Chat(loaded.tokenizer, loaded.chat_template)
