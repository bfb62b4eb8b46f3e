"""Talk to a trained model in the terminal.

    python tools/chat.py --checkpoint runs/finetune_instructions
    python tools/chat.py --checkpoint smollm2-135m --system "Answer in one sentence."
    printf 'Hello!\\nAnd in French?\\n' | python tools/chat.py --checkpoint smollm2-135m

A line is a message; the answer appears as it is written. Lines that begin with / are commands:

    /reset          forget the conversation
    /system TEXT    a system message, from here on and without what was said; no TEXT: none
    /help           these lines
    /exit           end, as the end of the input (Ctrl-D) does

Ctrl-C ends an answer, and what there is of it stays. When a conversation is longer than
--context, its oldest turns are forgotten, and a line says so.

--checkpoint is whatever tools/generate.py takes. Conversations are put into the chat template that
came with the model's tokenizer; a model without one gets Alpaca's, which launchers/finetune.py
teaches, unless --chat-template names another. Answer k is drawn with the seed `--seed + k - 1`.
Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

from megaegpt.arguments import ArgumentParser, integer
from megaegpt.config import GenerationConfig
from megaegpt.errors import DataError, exits_cleanly
from megaegpt.generation.model_options import (
    add_context_option,
    add_memory_options,
    add_model_options,
    add_sampling_options,
    context_of,
    load_model,
    memory_limits,
    sampling_config,
)

if TYPE_CHECKING:  # torch is imported once the command line is right
    from megaegpt.data.instruction.conversations import Message
    from megaegpt.generation.chat import Chat
    from megaegpt.generation.continuation import Continuation
    from megaegpt.generation.trained import LoadedModel
    from megaegpt.model.egpt.held_tokens import MemoryLimits

_DEFAULTS = GenerationConfig(max_new_tokens=512, top_k=50)
_COMMANDS = ("/reset", "/system", "/help", "/exit")


@exits_cleanly
def main() -> None:
    """Talk as told on the command line."""
    arguments = _parse_arguments()
    config = sampling_config(arguments)
    from megaegpt.generation.sampling import check_sampling

    check_sampling(config, [config.seed])
    loaded = load_model(arguments)
    limits, context = memory_limits(arguments, loaded.model), context_of(arguments, loaded.model)
    session = Session(loaded, _new_chat(loaded, arguments.chat_template), config, limits, context)
    session.system = arguments.system
    if sys.stdin.isatty():
        print("a message, or /help; Ctrl-C ends an answer, Ctrl-D the program", file=sys.stderr)
    talk(session)


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="a system message")
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="chatml, llama3, alpaca, or a file of Jinja (default: the tokenizer's own, else "
        "alpaca)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=integer(1),
        default=_DEFAULTS.max_new_tokens,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    add_sampling_options(parser, _DEFAULTS)
    add_context_option(parser)
    add_memory_options(parser)
    return parser.parse_args()


def _new_chat(loaded: LoadedModel, wanted: str | None) -> Chat:
    from megaegpt.data.instruction.chat_template import load_chat_template
    from megaegpt.generation.chat import Chat, find_chat

    if (chat := find_chat(loaded, wanted)) is not None:
        return chat
    print("the model has no chat template: Alpaca's is used", file=sys.stderr)
    return Chat(loaded.tokenizer, load_chat_template(loaded.tokenizer, "alpaca"))


# -- the conversation ------------------------------------------------------------------------------


class Session:
    """What was said, and who says it.

    Args:
        loaded: the model.
        chat: how conversations are written down.
        config: how answers are drawn.
        limits: of what an EGPT's token memory holds.
        context: most tokens of a conversation, its answer included; None: any number.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        chat: Chat,
        config: GenerationConfig,
        limits: MemoryLimits,
        context: int | None,
    ) -> None:
        from megaegpt.generation.continuation import Continuation

        self._tokenizer, self._chat, self._config = loaded.tokenizer, chat, config
        self._writer: Continuation = Continuation(
            loaded.model,
            loaded.encoder,
            loaded.tokenizer.vocab_size,
            limits,
            sys.maxsize if context is None else context,
        )
        self._context = context
        self._answers = 0
        self.system = ""
        self.turns: list[Message] = []

    def answer(self, text: str) -> Generator[str]:
        """Yield the answer to a message in pieces. Both become part of the conversation, the answer
        as far as it has come when the iteration is left.

        Raises:
            DataError: the message is too long, or the template refuses it; it is not kept then.
        """
        from dataclasses import replace

        from megaegpt.data.instruction.conversations import Message
        from megaegpt.serving.text_stream import TextStream

        turns = [*self.turns, Message("user", text)]
        prompt = self._prompt(turns)
        self.turns = turns
        most = min(self._config.max_new_tokens, self._room(len(prompt)))
        config, seed = replace(self._config, max_new_tokens=most), self._config.seed + self._answers
        self._answers += 1
        written, said = TextStream(self._tokenizer, self._chat.end_texts), ""
        try:
            stop = self._chat.end_tokens
            for token in self._writer.stream(prompt, config, stop=stop, seed=seed):
                if piece := written.add(token):
                    said += piece
                    yield piece
                if written.stopped:
                    break
            said += (rest := written.end())
            if rest:
                yield rest
        finally:
            self.turns = [*self.turns, Message("assistant", said)]

    def _prompt(self, turns: list[Message]) -> list[int]:
        """Of the conversation, or of the end of it that leaves room for an answer; ``turns`` loses
        what is left out.
        """
        from megaegpt.data.instruction.conversations import Message

        most = None
        if self._context is not None:
            most = max(self._context - self._config.max_new_tokens, self._context // 2)
        system = [Message("system", self.system)] if self.system else []
        prompt = self._chat.encode_newest((*system, *turns), most)
        if prompt.dropped:
            del turns[: prompt.dropped]
            print(
                f"[the conversation is longer than the context of {self._context} tokens: its "
                f"oldest {prompt.dropped} messages are forgotten]",
                file=sys.stderr,
            )
        return prompt.ids

    def _room(self, prompt_tokens: int) -> int:
        return sys.maxsize if self._context is None else self._context - prompt_tokens


# -- the terminal ----------------------------------------------------------------------------------


def talk(session: Session) -> None:
    """Answer lines of the input until it ends or asks for the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, so that the arrow keys edit and recall lines
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that a line is refused, and no more
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /exit ends the program]", file=sys.stderr)
            continue
        if line is None or line.split()[:1] == ["/exit"]:
            return
        if not _is_text(line):
            print("[the line is not UTF-8]", file=sys.stderr)
        elif line.startswith("/"):
            _obey(session, line)
        elif line.strip():
            _show_answer(session, line)


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:  # bytes that are no character of the terminal's
        return False
    return True


def _read_line() -> str | None:
    """None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # input would put it among the answers
        return input()
    except EOFError:
        print(file=sys.stderr)
        return None


def _obey(session: Session, line: str) -> None:
    command, _, text = line.partition(" ")
    if command == "/reset":
        session.turns = []
    elif command == "/system":
        session.system, session.turns = text.strip(), []
    elif command == "/help":
        print((__doc__ or "").split("commands:\n\n")[1].split("\n\n")[0], file=sys.stderr)
    else:
        known = ", ".join(_COMMANDS)
        print(f"[{command} is no command; there are {known}]", file=sys.stderr)


def _show_answer(session: Session, message: str) -> None:
    try:
        with contextlib.closing(session.answer(message)) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
    except DataError as error:
        print(f"[{error}]", file=sys.stderr)
        return
    sys.stdout.write("\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
