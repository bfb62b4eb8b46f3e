"""The bodies of answers, in the form of OpenAI's HTTP API."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.serving.batcher import TokenChoice


class AnswerForm:
    """One answer to ``/v1/completions``, whole or in chunks.

    Args:
        model: its name.
        tokenizer: of the model.
        logprobs: whether probabilities are shown.
    """

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._model, self._tokenizer, self._logprobs = model, tokenizer, logprobs
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._written = 0  # characters
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def whole(
        self, text: str, choices: Sequence[TokenChoice], reason: str, usage: dict[str, int]
    ) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        choice = self._content(text, choices) | {"index": 0, "finish_reason": reason}
        return self._object(self.whole_object, [choice]) | {"usage": usage}

    def begin(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def chunk(self, text: str, choices: Sequence[TokenChoice]) -> dict[str, Any]:
        """A piece of the answer."""
        choice = self._piece(text, choices) | {"index": 0, "finish_reason": None}
        return self._object(self.chunk_object, [choice])

    def end(self, reason: str) -> dict[str, Any]:
        """The last chunk of the answer."""
        choice = self._last_piece() | {"index": 0, "finish_reason": reason}
        return self._object(self.chunk_object, [choice])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last one, where it was asked for."""
        return self._object(self.chunk_object, []) | {"usage": usage}

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _content(self, text: str, choices: Sequence[TokenChoice]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._show(choices)}

    def _piece(self, text: str, choices: Sequence[TokenChoice]) -> dict[str, Any]:
        return self._content(text, choices)

    def _last_piece(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _show(self, choices: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        tokens = [self._text(choice.token) for choice in choices]
        offsets = []
        for choice in choices:
            offsets.append(self._written)
            content = self._tokenizer.decode_bytes([choice.token])
            self._written += len(self._decoder.decode(content))
        return {
            "tokens": tokens,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [
                {self._text(token): logprob for token, logprob in choice.top} for choice in choices
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        """As OpenAI shows parts of a character, which would look alike as text."""
        content = self._tokenizer.decode_bytes([token])
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class ChatAnswerForm(AnswerForm):
    """One answer to ``/v1/chat/completions``."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[dict[str, Any]]:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return [self._object(self.chunk_object, [choice])]

    def _content(self, text: str, choices: Sequence[TokenChoice]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"message": message, "logprobs": self._show(choices)}

    def _piece(self, text: str, choices: Sequence[TokenChoice]) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": self._show(choices)}

    def _last_piece(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _show(self, choices: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        shown = [
            self._entry(choice.token, choice.logprob)
            | {"top_logprobs": [self._entry(*pair) for pair in choice.top]}
            for choice in choices
        ]
        return {"content": shown}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.decode_bytes([token])
        return {"token": self._text(token), "logprob": logprob, "bytes": list(content)}


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """``usage``"""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
