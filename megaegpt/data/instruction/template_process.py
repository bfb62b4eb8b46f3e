"""A chat template's process: what it is asked, how long it may take, and its end."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaegpt.errors import ChatTemplateError, DataError

_WORKER = Path(__file__).with_name("template_worker.py")
_MOST_TEXT = 1 << 26
_READ = 1 << 16
_START_S = 60.0
"""Until a worker has imported Jinja, on a machine that is busy otherwise."""


class TemplateProcess:
    """Renders a template's source in a process that is started when it is first needed and ends
    with this object. Threads may share it.

    Args:
        source: Jinja.
        name: of the template, for messages.
        seconds: a request may take so long.
    """

    def __init__(self, source: str, name: str, seconds: float) -> None:
        self._source, self._name, self._seconds = source, name, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """The worker's answers to several renderings.

        Raises:
            DataError: the template is no Jinja.
            ChatTemplateError: it took too long or too much memory.
        """
        with self._lock:
            process = self._process
            try:
                process = process or self._start()
                return self._exchange(process, requests)
            except BaseException:
                process, self._process = self._process, None
                if process is not None:
                    _end(process)
                raise

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            # -P: the modules beside the worker are not those that it imports by name.
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process = process
        weakref.finalize(self, _end, process)
        self._read_line(process, _START_S)
        self._write(process, self._source)
        return process

    def _write(self, process: subprocess.Popen[bytes], value: Any) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise ChatTemplateError(f"the process of {self._name} has ended") from None

    def _exchange(
        self, process: subprocess.Popen[bytes], requests: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, str]]:
        self._write(process, requests)
        replies = json.loads(self._read_line(process, self._seconds))
        if isinstance(replies, dict):
            raise DataError(f"{self._name}: {replies['error']}")
        return list(replies)

    def _read_line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        output, poll = process.stdout.fileno(), select.poll()  # select's own takes small numbers
        poll.register(output, select.POLLIN)
        end, line = time.monotonic() + seconds, bytearray()
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise ChatTemplateError(
                    f"{self._name} did not end within {seconds:g} s: it loops, or asks for "
                    "more than a template may, or this machine is too busy"
                )
            part = os.read(output, _READ)
            line += part
            if not part or len(line) > _MOST_TEXT:
                raise ChatTemplateError(
                    f"{self._name}: its process ended, or wrote more than 64 MiB"
                )
        return bytes(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
