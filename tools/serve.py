"""Serve a trained GPT, EGPT or DeepGPT over HTTP, in the form of OpenAI's API.

    python tools/serve.py --checkpoint runs/egpt
    python tools/serve.py --checkpoint smollm2-135m --port 8080 --batch-size 16
    MEGAEGPT_TOKEN=secret python tools/serve.py --checkpoint weights --host 0.0.0.0

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Well, Prince,", "max_tokens": 50}'

/v1/models, /v1/completions and /v1/chat/completions are what clients of OpenAI's expect, with
streams, `stop`, `logprobs`, `seed` and usage; /health says that it runs, and / is a page to talk to
the model. --checkpoint is whatever tools/generate.py takes.

Texts of a GPT are written as one batch, which they join and leave between two tokens. Beyond
--batch-size they wait, and beyond --queue they are refused (429). SIGTERM lets what has begun end.

The server answers to this machine alone. Another --host needs a token, which clients send as their
API key. It needs the extra `serve` (pip install -e '.[serve]').
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from megaegpt.arguments import ArgumentParser, integer, number
from megaegpt.errors import ConfigError, LaunchError, exits_cleanly
from megaegpt.generation.model_options import (
    add_context_option,
    add_memory_options,
    add_model_options,
    context_of,
    load_model,
    memory_limits,
)

if TYPE_CHECKING:  # torch is imported once the command line is right
    from fastapi import FastAPI

    from megaegpt.generation.chat import Chat
    from megaegpt.generation.trained import LoadedModel

_TOKEN_VARIABLE = "MEGAEGPT_TOKEN"
_DRAIN_EXTRA_S = 5.0


@exits_cleanly
def main() -> None:
    """Serve as told on the command line."""
    arguments = _parse_arguments()
    import uvicorn

    from megaegpt.serving.http_app import is_loopback

    if arguments.token is None and not is_loopback(arguments.host):
        raise ConfigError(
            f"--host {arguments.host} can be reached from other machines: give a --token that "
            f"clients must send, or set {_TOKEN_VARIABLE}"
        )
    listener = _listen(arguments.host, arguments.port)
    app, name = _new_app(arguments)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{port} (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(arguments.timeout + _DRAIN_EXTRA_S),
    )
    # Uvicorn raises the signal that has ended it once more; while the model is loaded it kills.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument(
        "--port", type=integer(0, 65535), default=8000, help="0: any (default: %(default)s)"
    )
    parser.add_argument(
        "--token", help=f"that clients must send (default: the variable {_TOKEN_VARIABLE}, if set)"
    )
    parser.add_argument(
        "--name", help="of the model for clients (default: that of the checkpoint's folder)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="chatml, llama3, alpaca, or a file of Jinja (default: the tokenizer's own)",
    )
    parser.add_argument(
        "--batch-size",
        type=integer(1, 4096),
        default=8,
        metavar="N",
        help="texts written at once (default: %(default)s)",
    )
    add_context_option(parser)
    parser.add_argument(
        "--queue",
        type=integer(1),
        default=128,
        metavar="N",
        help="requests that may wait (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=number(above=0, most=86400),
        default=300.0,
        metavar="S",
        help="seconds a request may take, its waiting included (default: %(default)s)",
    )
    add_memory_options(parser)
    arguments = parser.parse_args()
    if arguments.token is None:
        arguments.token = os.environ.get(_TOKEN_VARIABLE) or None
    if arguments.token is not None and not re.fullmatch(r"[!-~]+", arguments.token):
        parser.error("--token must be letters, digits and signs of ASCII, without blanks")
    return arguments


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded, which takes longer than seeing that a port is taken.

    Raises:
        LaunchError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LaunchError(f"--host {host} --port {port} cannot be used: {reason}") from None


def _new_app(arguments: argparse.Namespace) -> tuple[FastAPI, str]:
    """The application and the name of its model."""
    from megaegpt.serving.batcher import Batcher
    from megaegpt.serving.http_app import Served, create_app
    from megaegpt.serving.running_rows import new_rows

    loaded = load_model(arguments)
    context = context_of(arguments, loaded.model)
    limits = memory_limits(arguments, loaded.model)
    rows = new_rows(loaded.model, loaded.encoder, arguments.batch_size, context, limits)
    batcher = Batcher(rows, loaded.tokenizer, loaded.model.grid.device, arguments.queue)
    served = Served(
        name=model_name(arguments.checkpoint, arguments.name),
        tokenizer=loaded.tokenizer,
        context=rows.context,
        chat=_chat_of(loaded, arguments.chat_template),
        token=arguments.token,
        timeout=arguments.timeout,
    )
    return create_app(served, batcher), served.name


def _chat_of(loaded: LoadedModel, wanted: str | None) -> Chat | None:
    from megaegpt.data.instruction.named_templates import NAMED_TEMPLATES
    from megaegpt.generation.chat import find_chat

    chat = find_chat(loaded, wanted)
    if chat is None:
        print(
            "the tokenizer has no chat template: /v1/chat/completions is off "
            f"(--chat-template {', '.join(NAMED_TEMPLATES)}, or a file of Jinja)",
            flush=True,
        )
    return chat


def model_name(checkpoint: Path, wanted: str | None = None) -> str:
    """``wanted``, else ``egpt`` of ``runs/egpt/checkpoints/step_00000100``; bytes of either that
    are no characters are written as numbers, since answers are UTF-8.
    """
    name = wanted or _name_of_run(checkpoint)
    return name.encode(errors="backslashreplace").decode()


def _name_of_run(checkpoint: Path) -> str:
    parts = [
        part
        for part in checkpoint.resolve().parts
        if not re.fullmatch(r"checkpoints|weights|latest|best|step_\d+", part)
    ]
    return Path(parts[-1]).name.removesuffix(".gguf") or "model"


if __name__ == "__main__":
    main()
