"""The HTTP server: OpenAI's ``/v1`` over a batcher, and a page to talk to the model.

Whatever goes wrong is answered in the API's error form. A client that leaves takes its text out of
the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from megaegpt.config import GenerationConfig
from megaegpt.data.instruction.conversations import Message
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import ChatTemplateError, DataError
from megaegpt.generation.chat import Chat
from megaegpt.serving.api_answers import AnswerForm, ChatAnswerForm, usage_of
from megaegpt.serving.api_requests import ApiError, ChatRequest, CompletionRequest, parse_request
from megaegpt.serving.batcher import Batcher, ClosedError, Event, Job, QueueFullError
from megaegpt.serving.job_events import EventStream, JobEvents

MOST_BODY_BYTES = 32 << 20
"""A book is a few million bytes."""

_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
_UNBOUNDED_ANSWER = 1024
"""Tokens of a chat's answer where nothing else bounds it."""


@dataclass(frozen=True)
class Served:
    """What is served, and to whom."""

    name: str
    tokenizer: Tokenizer
    context: int | None
    """Most tokens of a prompt and its answer; None: any number."""
    chat: Chat | None
    """None: the model has no chat template."""
    token: str | None
    """That clients must send; None: none, and only names of this machine are answered."""
    timeout: float
    """Seconds a request may take, its waiting included."""


def create_app(served: Served, batcher: Batcher) -> FastAPI:
    """The application; the batcher is closed when it shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
        dependencies=[Depends(_only_this_machine(served))],
    )  # fmt: skip
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_bug)
    endpoints = _Endpoints(served, batcher)
    app.get("/")(_page)
    app.get("/health")(endpoints.health)
    api = APIRouter(prefix="/v1", dependencies=[Depends(_with_token(served))])
    api.get("/models")(endpoints.models)
    api.get("/models/{name:path}")(endpoints.model)
    api.post("/completions")(endpoints.complete)
    api.post("/chat/completions")(endpoints.chat)
    app.include_router(api)
    return app


# -- who is answered -------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    if host in _LOOPBACK_NAMES:
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


Check = Callable[[Request], Awaitable[None]]


def _only_this_machine(served: Served) -> Check:
    """Without a token, a page of another site must not reach the model through a browser here by a
    name that it lets point to this machine.
    """

    async def check(request: Request) -> None:
        if served.token is None and not is_loopback(request.url.hostname or ""):
            raise ApiError(403, "this server answers to the names of its own machine only")

    return check


def _with_token(served: Served) -> Check:
    async def check(request: Request) -> None:
        if served.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        wanted = served.token.encode()
        same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), wanted)
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "the server's token is needed, as `Authorization: Bearer TOKEN`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


# -- errors ----------------------------------------------------------------------------------------


def _error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})
    return _error_response(ApiError(error.status_code, message, headers=headers))


async def _answer_bug(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(500, "the server failed; its log says why"))


# -- endpoints -------------------------------------------------------------------------------------


async def _page() -> Response:
    headers = {"Content-Security-Policy": _PAGE_POLICY, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)


class _Endpoints:
    def __init__(self, served: Served, batcher: Batcher) -> None:
        self._served, self._batcher = served, batcher
        self._created = int(time.time())

    async def health(self) -> Response:
        running, waiting = self._batcher.counts()
        alive = self._batcher.is_alive
        body = {"status": "ok" if alive else "stopped", "running": running, "waiting": waiting}
        return JSONResponse(body, 200 if alive else 503)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model()

    async def complete(self, request: Request) -> Response:
        wanted = parse_request(await _read_body(request), CompletionRequest)
        self._check_model(wanted.model)
        prompt = wanted.one_prompt
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(self._served.tokenizer.encode_prompt, prompt)
        else:
            ids = prompt
            last = self._served.tokenizer.vocab_size - 1
            if not ids or min(ids) < 0 or max(ids) > last:
                raise ApiError(400, f"prompt: ids from 0 to {last}, at least one", param="prompt")
        form = AnswerForm(self._served.name, self._served.tokenizer, wanted.logprobs is not None)
        return await self._answer(request, wanted, ids, None, form, "prompt")

    async def chat(self, request: Request) -> Response:
        wanted = parse_request(await _read_body(request), ChatRequest)
        self._check_model(wanted.model)
        chat = self._served.chat
        if chat is None:
            raise ApiError(
                400,
                "this model has no chat template: start the server with --chat-template, or ask "
                "/v1/completions",
                code="no_chat_template",
            )
        messages = tuple(
            Message(message.template_role, message.text) for message in wanted.messages
        )
        try:
            ids = await asyncio.to_thread(chat.encode, messages)
        except ChatTemplateError as error:  # no fault of the request's
            raise ApiError(503, str(error), headers={"Retry-After": "1"}) from None
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        form = ChatAnswerForm(self._served.name, self._served.tokenizer, bool(wanted.logprobs))
        return await self._answer(request, wanted, ids, chat, form, "messages")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "megaegpt",
            "max_model_len": self._served.context,
            "chat": self._served.chat is not None,
        }

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._served.name):
            raise ApiError(
                404,
                f"there is no model {name!r} here; this server has {self._served.name!r}",
                param="model",
                code="model_not_found",
            )

    async def _answer(
        self,
        request: Request,
        wanted: CompletionRequest | ChatRequest,
        ids: list[int],
        chat: Chat | None,
        form: AnswerForm,
        param: str,
    ) -> Response:
        """Write the text, and answer with it or stream it."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job = Job(
            prompt=ids,
            sampling=self._sampling(wanted, len(ids), param),
            deliver=lambda event: loop.call_soon_threadsafe(events.put_nowait, event),
            stops=wanted.stops if chat is None else (*wanted.stops, *chat.end_texts),
            end_tokens=(chat or self._served.tokenizer).end_tokens,
            top_logprobs=wanted.top_logprobs_wanted,
            deadline=time.monotonic() + self._served.timeout,
        )
        try:
            self._batcher.submit(job)
        except QueueFullError as error:
            raise ApiError(
                429, f"{error}: try again", code="queue_full", headers={"Retry-After": "1"}
            ) from None
        except ClosedError as error:
            raise ApiError(503, str(error)) from None
        answers = JobEvents(request, job, events)
        if not wanted.stream:
            written = await answers.whole()
            usage = usage_of(len(ids), written.ended.tokens)
            body = form.whole(written.text, written.choices, written.ended.reason, usage)
            return JSONResponse(body)
        first = await answers.next_event()  # a failure until then has a status of its own
        return EventStream(answers, first, form, wanted.wants_usage, len(ids))

    def _sampling(
        self, wanted: CompletionRequest | ChatRequest, prompt_tokens: int, param: str
    ) -> GenerationConfig:
        context, most = self._served.context, wanted.wanted_tokens
        if context is not None:
            room = context - prompt_tokens
            if room < (most or 1):
                asked = f" and {most} of the answer" if most else ""
                raise ApiError(
                    400,
                    f"this model's context is {context} tokens; the request has {prompt_tokens} of "
                    f"the prompt{asked}",
                    param=param,
                    code="context_length_exceeded",
                )
            most = most or room
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed % 2**63
        return GenerationConfig(
            max_new_tokens=most or _UNBOUNDED_ANSWER,
            temperature=1.0 if wanted.temperature is None else wanted.temperature,
            top_k=None,
            top_p=wanted.top_p,
            seed=seed,
        )


async def _read_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which pages of other sites cannot send without being asked
        raise ApiError(415, "the body must be JSON, with `Content-Type: application/json`")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MOST_BODY_BYTES:,} bytes")
    return bytes(body)
