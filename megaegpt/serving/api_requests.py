"""The bodies of requests, in the form of OpenAI's HTTP API, and of errors.

A request is checked strictly: a field that is not known or has a wrong type is refused, and so is
one that this server does not act on, unless it has the value that asks for nothing.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megaegpt.data.instruction.conversations import Role

MOST_STOPS = 4
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class ApiError(Exception):
    """An answer in the API's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """``{"error": {...}}``"""
        kind = _ERROR_TYPES.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        shown = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": shown}


_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


# -- requests --------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """``stream_options``"""

    include_usage: bool | None = None


class _Request(_Strict):
    """What both kinds of requests have."""

    model: str | None = None
    """None: the one that the server has."""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Without an effect, and refused where they ask for one:
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> _Request:
        for name, neutral in self._neutral().items():
            if getattr(self, name) not in (None, *neutral):
                only = f"; only {name}={json.dumps(neutral[0])} is" if neutral else ""
                raise ValueError(f"{name} is not supported by this server{only}")
        if not all(self.stops) or len(self.stops) > MOST_STOPS:
            raise ValueError(f"stop must be 1 to {MOST_STOPS} texts, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields, and the values of them that ask for nothing."""
        zero = (0, 0.0)
        return {
            "n": (1,),
            "presence_penalty": zero,
            "frequency_penalty": zero,
            "logit_bias": ({},),
        }

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """In a chunk of its own at the end of a stream."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_Request):
    """``POST /v1/completions``"""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return super()._neutral() | {"best_of": (1,), "echo": (False,), "suffix": ("",)}

    @property
    def one_prompt(self) -> str | list[int]:
        """The text, or its ids.

        Raises:
            ApiError: there are several.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, "one prompt a request: send them side by side", param="prompt")
            prompt = prompt[0]
        return prompt

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens or _DEFAULT_COMPLETION_TOKENS

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Likeliest tokens to name; None: no probabilities."""
        return self.logprobs


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn. The fields that are always null come back from clients that send answers again."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None

    @property
    def text(self) -> str:
        """The parts of the message, one after the other."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def template_role(self) -> Role:
        """The role by the name that chat templates know."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(_Request):
    """``POST /v1/chat/completions``"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return super()._neutral() | {
            "response_format": ({"type": "text"},),
            "tools": ([],),
            "tool_choice": ("none",),
        }

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of the answer; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Likeliest tokens to name; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


R = TypeVar("R", CompletionRequest, ChatRequest)


def parse_request(body: bytes, kind: type[R]) -> R:
    """The request in a body of JSON.

    Raises:
        ApiError: it is no JSON, or no such request; with the first field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = [str(part) for part in first["loc"] if not _is_type(part)]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}")
    if first["type"] == "extra_forbidden":
        message = "is not a field of this request"
    is_ours = first["type"] == "value_error"  # whose messages begin with the field
    param = where[0] if where else message.split()[0] if is_ours else None
    raise ApiError(400, f"{'.'.join(where)}: {message}" if where else message, param=param)


def _is_type(part: str | int) -> bool:
    """Of the place of an error: which of a field's types was tried, and not a field."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
