"""A server in this process, with a tiny model, and rows that wait for a test."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import uvicorn
from torch import Tensor

from megaegpt.generation.trained import LoadedModel
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING
from megaegpt.serving.batcher import Batcher
from megaegpt.serving.http_app import Served, create_app
from megaegpt.serving.running_rows import Reading, RunningRows, new_rows
from tests.tiny.loaded import load_speaking

LOADED = load_speaking("gpt")
NAME = "tiny"


class Gate:
    """Rows that take a step only when they are let, or fail."""

    def __init__(self, rows: RunningRows) -> None:
        self._rows, self.context = rows, rows.context
        self.most, self.piece = rows.most, rows.piece
        self.is_open = threading.Event()
        self.fault: Exception | None = None
        self.steps = 0

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, tokens: int, more: int) -> Reading:
        return self._rows.read(tokens, more)

    def join(self, reading: Reading) -> None:
        self._rows.join(reading)

    def leave(self, row: int) -> None:
        self._rows.leave(row)

    def advance(self, tokens: Sequence[int]) -> Tensor:
        self.steps += 1
        while not self.is_open.wait(0.01):
            if self.fault is not None:
                fault, self.fault = self.fault, None
                raise fault
        return self._rows.advance(tokens)


class Server:
    """Its address, and what is behind it."""

    def __init__(self, server: uvicorn.Server, port: int, batcher: Batcher, gate: Gate) -> None:
        self.uvicorn, self.port, self.batcher, self.gate = server, port, batcher, gate
        self.url = f"http://127.0.0.1:{port}/v1"

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of any request; ``body`` is JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        with contextlib.closing(connection):
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def error_of(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status of a POST that fails, and the error in its body."""
        status, _, content = self.ask("POST", path, body, **headers)
        assert b"Traceback" not in content
        answer = json.loads(content)
        assert list(answer) == ["error"]
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]

    def begin(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request and do not wait for its answer."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection


@contextlib.contextmanager
def serving(
    loaded: LoadedModel = LOADED,
    *,
    batch_size: int = 4,
    queue: int = 128,
    gated: bool = False,
    **changes: Any,
) -> Iterator[Server]:
    """A server, up to its shutdown; ``changes`` are those of :class:`Served`."""
    rows = new_rows(loaded.model, loaded.encoder, batch_size, None, AS_IN_TRAINING)
    gate = Gate(rows)
    if not gated:
        gate.is_open.set()
    batcher = Batcher(gate, loaded.tokenizer, torch.device("cpu"), queue)
    served = Served(NAME, loaded.tokenizer, rows.context, None, None, 30.0)
    config = uvicorn.Config(create_app(replace(served, **changes), batcher), log_level="critical")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Server(server, listener.getsockname()[1], batcher, gate)
    finally:
        gate.is_open.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        assert not batcher.is_alive


def wait_until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Look again and again."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
