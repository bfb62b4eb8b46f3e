"""The events of a job on their way to its client: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from megaegpt.serving.api_answers import AnswerForm, usage_of
from megaegpt.serving.api_requests import ApiError
from megaegpt.serving.batcher import Ended, Event, Failed, Job, TokenChoice, Written

_STATUS = {"timeout": 504, "refused": 503, "internal": 500}


class WrittenText(NamedTuple):
    """A whole answer."""

    text: str
    choices: list[TokenChoice]
    ended: Ended


class JobEvents:
    """The events of a job, as long as its client is there."""

    def __init__(self, request: Request, job: Job, events: asyncio.Queue[Event]) -> None:
        self._request, self.job, self.events = request, job, events

    async def whole(self) -> WrittenText:
        """All of the text.

        Raises:
            ApiError: it could not be written, or the client has left.
        """
        text, choices = "", list[TokenChoice]()
        while True:
            event = await self.next_event()
            if isinstance(event, Ended):
                return WrittenText(text, choices, event)
            text += event.text
            choices += event.choices

    async def next_event(self) -> Written | Ended:
        """The next event, unless the client leaves before it.

        Raises:
            ApiError: as for :meth:`whole`.
        """
        event = asyncio.ensure_future(self.events.get())
        gone = asyncio.ensure_future(_until_gone(self._request))
        try:
            await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                raise ApiError(499, "the client has left")
            return _need(event.result())
        except BaseException:
            self.job.cancelled.set()
            raise
        finally:
            event.cancel()
            gone.cancel()


def _need(event: Event) -> Written | Ended:
    if isinstance(event, Failed):
        raise ApiError(_STATUS[event.kind], event.message, code=event.kind)
    return event


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; a failure is the last of them."""

    def __init__(
        self,
        answers: JobEvents,
        first: Written | Ended,
        form: AnswerForm,
        wants_usage: bool,
        prompt_tokens: int,
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        chunks = self._chunks(answers, first, form, wants_usage, prompt_tokens)
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._job = answers.job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Until all is sent or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled.set()

    async def _chunks(
        self,
        answers: JobEvents,
        event: Written | Ended,
        form: AnswerForm,
        wants_usage: bool,
        prompt_tokens: int,
    ) -> AsyncIterator[str]:
        for chunk in form.begin():
            yield _sse(chunk)
        try:
            while isinstance(event, Written):
                yield _sse(form.chunk(event.text, event.choices))
                event = _need(await answers.events.get())
        except ApiError as error:
            yield _sse(error.body())
            return
        yield _sse(form.end(event.reason))
        if wants_usage:
            yield _sse(form.usage_chunk(usage_of(prompt_tokens, event.tokens)))
        yield "data: [DONE]\n\n"


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
