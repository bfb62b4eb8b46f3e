"""The program: where it listens, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import uvicorn

from tests.generation.test_trained import save_egpt, save_gpt
from tools import serve

ROOT = Path(__file__).parents[2]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    sys.argv = ["serve.py", *map(str, arguments)]
    with pytest.raises(SystemExit) as end:
        serve.main()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("MEGAEGPT_TOKEN", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "model.example.org"])
def test_another_address_needs_a_token(capsys: pytest.CaptureFixture[str], host: str) -> None:
    error = error_of(capsys, "--checkpoint", "none", "--host", host)
    assert f"--host {host} can be reached from other machines: give a --token" in error


@pytest.mark.parametrize("token", ["two words", "ä", ""])
def test_a_token_is_what_a_header_can_hold(capsys: pytest.CaptureFixture[str], token: str) -> None:
    assert "--token" in error_of(capsys, "--checkpoint", "none", f"--token={token}")


def test_an_address_that_is_taken_is_named_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = error_of(capsys, "--checkpoint", "none", "--port", port)
    assert f"--host 127.0.0.1 --port {port} cannot be used: " in error
    assert "use" in error


def test_what_does_not_fit_the_model_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpt = save_gpt(tmp_path / "gpt")
    egpt = save_egpt(tmp_path / "egpt", gpt)
    given = ("--port", 0, "--checkpoint")
    assert "more than the model sees" in error_of(capsys, *given, gpt, "--context", 10**6)
    assert "any length" in error_of(capsys, *given, egpt, "--context", 8)
    for option in (("--memory-tokens", 8), ("--memory-dtype", "int8")):
        assert "token_memory" in error_of(capsys, *given, egpt, *option)
    assert "no folder" in error_of(capsys, *given, tmp_path / "none")


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("runs/egpt/checkpoints/step_00000100", "egpt"),
        ("runs/egpt/checkpoints/", "egpt"),
        ("models/smol.gguf", "smol"),
        ("smollm2-135m", "smollm2-135m"),
        ("runs/caf\udce9", r"caf\udce9"),
    ],
)
def test_a_model_has_the_name_of_its_run(checkpoint: str, name: str) -> None:
    assert serve.model_name(Path(checkpoint)) == name
    assert serve.model_name(Path("other"), Path(checkpoint).name).encode()


def test_a_model_without_a_chat_template_is_served_with_the_names_of_some(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    checkpoint = save_gpt(tmp_path / "gpt")
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port", "0", "--checkpoint", str(checkpoint)])
    serve.main()
    off = "/v1/chat/completions is off (--chat-template chatml, llama3, alpaca, or a file of Jinja)"
    assert off in capsys.readouterr().out


@pytest.mark.long
def test_it_answers_and_ends_with_what_has_begun_finished(tmp_path: Path) -> None:
    checkpoint = save_gpt(tmp_path / "tiny", max_seq_len=1024)
    command = [sys.executable, "tools/serve.py", "--checkpoint", str(checkpoint), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            shown = next(line for line in process.stdout if line.startswith("serving "))
            (url,) = re.findall(r"^serving tiny at (http://127\.0\.0\.1:\d+) ", shown)
            body = {"model": "tiny", "prompt": "It", "max_tokens": 800, "stream": True}
            request = urllib.request.Request(
                f"{url}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.readline().startswith(b"data: ")
                process.send_signal(signal.SIGTERM)
                assert answer.read().endswith(b"data: [DONE]\n\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
