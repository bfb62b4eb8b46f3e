"""A headless Chromium, driven through its DevTools pipe.

``MEGAEGPT_CHROMIUM`` names the program where it is not on the path; the npm package
``@sparticuz/chromium`` has one for servers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "headless_shell")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--single-process"),
    *("--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe"),
)


def find_chromium() -> str | None:
    """The program, if this machine has it."""
    names = [os.environ.get("MEGAEGPT_CHROMIUM", ""), *_NAMES]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Page:
    """A tab: what scripts answer, and what went wrong in it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.faults: list[str] = []
        self.requested: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Runtime", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        script = (
            "new Promise((found, lost) => { const end = Date.now() + %d; (function look() {"
            "if (%s) found(); else if (Date.now() > end) lost(new Error('never'));"
            "else setTimeout(look, 20); })(); })"
        )
        self.run(script % (seconds * 1000, condition))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and params["type"] == "error"
        ):
            self.faults.append(json.dumps(params)[:500])


@contextlib.contextmanager
def open_page(chromium: str, profile: Path) -> Iterator[Page]:
    """A tab of a browser that ends with it."""
    (read_commands, write_commands), (read_answers, write_answers) = os.pipe(), os.pipe()
    started = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
    process = subprocess.Popen(
        ["bash", "-c", started, chromium, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read_commands, write_answers),
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Page(write_commands, read_answers)
    finally:
        process.kill()
        process.wait()
        os.close(write_commands)
        os.close(read_answers)
