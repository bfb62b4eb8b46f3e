"""Continuous batching: one thread writes all texts, one token of each at a time.

A job waits in a queue with a bound, has its prompt read beside the running texts, takes a row, and
leaves it when its text ends, its client goes or its time is over; the next one takes its place
between two tokens.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megaegpt.config import GenerationConfig
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import MegaEGPTError
from megaegpt.generation.sampling import NO_TOKEN, Sampler
from megaegpt.serving.running_rows import Reading, RunningRows
from megaegpt.serving.text_stream import TextStream

_LEAST_LOGPROB = -9999.0  # OpenAI's; JSON has no infinity
_LOG = logging.getLogger(__name__)


class TokenChoice(NamedTuple):
    """A drawn token and its natural logarithm of probability, before temperature and cuts."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, if some were asked for."""


class Written(NamedTuple):
    """A piece of a text."""

    text: str
    choices: tuple[TokenChoice, ...]
    """Of the tokens of ``text``, where they were asked for."""


class Ended(NamedTuple):
    """The last event of a text that was written."""

    reason: Literal["stop", "length"]
    tokens: int
    """That were drawn, an end of the text not counted."""


class Failed(NamedTuple):
    """The last event of a text that was not."""

    kind: Literal["timeout", "refused", "internal"]
    message: str


Event = Written | Ended | Failed


class QueueFullError(MegaEGPTError):
    """As many texts wait as may."""


class ClosedError(MegaEGPTError):
    """The batcher ends, and takes no more texts."""


@dataclass(eq=False)
class Job:
    """One text to be written.

    Attributes:
        prompt: at least one id.
        sampling: ``max_new_tokens``, temperature, cuts and the seed.
        deliver: called on the batcher's thread with each event; it must neither wait nor raise.
        stops: texts that end it, see :class:`~megaegpt.serving.text_stream.TextStream`.
        end_tokens: ids that end it.
        top_logprobs: likeliest tokens to name beside each drawn one; None: no probabilities.
        deadline: ``time.monotonic()`` at which it is given up.
        cancelled: set by whoever does not want it any more; no event follows.
    """

    prompt: list[int]
    sampling: GenerationConfig
    deliver: Callable[[Event], object]
    stops: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    deadline: float = float("inf")
    cancelled: threading.Event = field(default_factory=threading.Event)


class _Running:
    """A job, from when its prompt begins to be read."""

    def __init__(self, job: Job, reading: Reading, tokenizer: Tokenizer, device: torch.device):
        self.job, self.reading = job, reading
        self.read = 0
        self.last_token = 0
        self._sampler = Sampler(job.sampling, [job.sampling.seed], device)
        self._text = TextStream(tokenizer, job.stops)
        self._vocab_size = tokenizer.vocab_size
        self._drawn = 0
        self._choices: list[TokenChoice] = []

    def draw(self, logits: Tensor) -> bool:
        """Take the next token by (1, V) logits and deliver its text; whether more follows."""
        job, logits = self.job, logits[:, : self._vocab_size]
        token = int(self._sampler.draw(logits))
        if token == NO_TOKEN:
            job.deliver(Failed("internal", "the model's logits are not finite"))
            return False
        if token in job.end_tokens:
            return self._end("stop")
        self._drawn += 1
        self.last_token = token
        if job.top_logprobs is not None:
            self._choices.append(_choice(token, logits[0], job.top_logprobs))
        self._write(self._text.add(token))
        if self._text.stopped:
            return self._end("stop")
        return self._end("length") if self._drawn == job.sampling.max_new_tokens else True

    def _end(self, reason: Literal["stop", "length"]) -> bool:
        self._write(self._text.end(), last=True)
        self.job.deliver(Ended(reason, self._drawn))
        return False

    def _write(self, text: str, last: bool = False) -> None:
        if text or (last and self._choices):
            self.job.deliver(Written(text, tuple(self._choices)))
            self._choices = []


def _choice(token: int, logits: Tensor, top: int) -> TokenChoice:
    """(V,) logits"""
    logprobs = logits.float().log_softmax(-1).clamp(min=_LEAST_LOGPROB)
    values, ids = logprobs.topk(top)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenChoice(token, float(logprobs[token]), tuple(pairs))


class Batcher:
    """The thread, and the queue before it. Close it at the end.

    Args:
        rows: of the model; used by the thread alone.
        tokenizer: of the model.
        device: of the model.
        most_waiting: jobs that may wait for a row.
    """

    def __init__(
        self, rows: RunningRows, tokenizer: Tokenizer, device: torch.device, most_waiting: int
    ) -> None:
        self._rows, self._tokenizer, self._device = rows, tokenizer, device
        self._most_waiting = most_waiting
        self._waiting: deque[Job] = deque()
        self._reading: _Running | None = None
        self._running: list[_Running] = []  # by row
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: too many wait already.
            ClosedError: the batcher ends.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) >= self._most_waiting:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(job)
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """How many texts are being read or written, and how many wait."""
        return len(self._running) + (self._reading is not None), len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Give up what is not finished, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            try:
                self._give_up_unwanted()
                self._begin_next()
                if self._reading is not None:
                    self._read(self._reading)
                if self._running:
                    self._write()
            except Exception:
                _LOG.exception("a step of the batch failed")
                self._fail_all()

    def _wait(self) -> bool:
        """Until there is something to do; False at the end."""
        with self._changed:
            while not (self._closed or self._waiting or self._reading or self._running):
                self._changed.wait()
            return not self._closed

    def _give_up_unwanted(self) -> None:
        with self._changed:
            for job in [job for job in self._waiting if _is_over(job)]:
                self._waiting.remove(job)
        if self._reading is not None and _is_over(self._reading.job):
            self._reading = None
        for row in reversed(range(len(self._running))):
            if _is_over(self._running[row].job):
                self._leave(row)

    def _begin_next(self) -> None:
        if self._reading is not None or len(self._running) == self._rows.most:
            return
        with self._changed:
            job = self._waiting.popleft() if self._waiting else None
        if job is None:
            return
        try:
            reading = self._rows.read(len(job.prompt), job.sampling.max_new_tokens)
            self._reading = _Running(job, reading, self._tokenizer, self._device)
        except MegaEGPTError as error:  # no memory for it
            job.deliver(Failed("refused", str(error)))
            return
        except Exception:
            job.deliver(Failed("internal", "the text could not be begun"))
            raise

    def _read(self, new: _Running) -> None:
        """The next piece of a prompt; after the last one it joins the others."""
        piece = new.job.prompt[new.read : new.read + self._rows.piece]
        logits = new.reading.advance(torch.tensor([piece], device=self._device))
        new.read += len(piece)
        if new.read < len(new.job.prompt):
            return
        goes_on = new.draw(logits)
        if goes_on:
            self._rows.join(new.reading)
        self._reading = None  # not before: a fault is told to what is being read or written
        if goes_on:
            self._running.append(new)

    def _write(self) -> None:
        """One token of each running text."""
        logits = self._rows.advance([running.last_token for running in self._running])
        ended = [
            row
            for row, running in enumerate(self._running)
            if not running.draw(logits[row : row + 1])
        ]
        for row in reversed(ended):
            self._leave(row)

    def _leave(self, row: int) -> None:
        self._rows.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _fail_all(self) -> None:
        """What is being read or written, after a fault that may have touched any of it."""
        touched = [*self._running, *([self._reading] if self._reading else [])]
        self._running, self._reading = [], None
        while len(self._rows):
            self._rows.leave(len(self._rows) - 1)
        for running in touched:
            running.job.deliver(Failed("internal", "the server failed; its log says why"))


def _is_over(job: Job) -> bool:
    """Nobody wants it any more, or its time is over, which it is told."""
    if job.cancelled.is_set():
        return True
    if time.monotonic() < job.deadline:
        return False
    job.deliver(Failed("timeout", "the request took longer than the server allows"))
    return True
