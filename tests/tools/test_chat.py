"""A conversation by the program's input and output."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from megaegpt.config import GenerationConfig
from megaegpt.data.instruction.chat_template import ChatTemplate, load_chat_template
from megaegpt.data.instruction.conversations import Message
from megaegpt.errors import DataError
from megaegpt.generation.chat import Chat
from megaegpt.generation.continuation import Continuation
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.text_model import TextModel
from megaegpt.generation.trained import LoadedModel, load_for_inference
from megaegpt.model import decoding
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.base import LanguageModel
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING
from megaegpt.parallel.grid import ProcessGrid
from tests.generation.test_trained import save_egpt, save_gpt
from tests.tiny.loaded import CONFIGS, TOKENIZER
from tools import chat

TEMPLATE = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt(tmp_path_factory.mktemp("models") / "gpt", max_seq_len=64)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_for_inference(checkpoint, ProcessGrid())


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE, "plain")


@pytest.fixture
def says(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    loaded: LoadedModel,
    template: ChatTemplate,
):
    """The answers to lines of input, a line each, and stderr."""

    def say(*lines: str, system: str = "") -> tuple[list[str], str]:
        config = GenerationConfig(max_new_tokens=4, temperature=0)
        talks = Chat(loaded.tokenizer, template)
        session = chat.Session(loaded, talks, config, AS_IN_TRAINING, 64)
        session.system = system
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.talk(session)
        output = capsys.readouterr()
        return output.out.split("\n")[:-1], output.err

    return say


def test_an_answer_is_one_to_all_that_was_said(says, loaded: LoadedModel) -> None:
    (first, second), _ = says("Hello", "Why?")
    model = TextModel(loaded)
    assert first == model.generate("uHello", 4, temperature=0)
    assert second == model.generate(f"uHelloa{first}uWhy?", 4, temperature=0)


def test_reset_forgets_and_system_is_said_first(says, loaded: LoadedModel) -> None:
    lines = ("Hello", "/reset", "Hello", "/system Shout. ", "Hello", "/system", "Hello")
    answers, _ = says(*lines, system="Be brief.")
    prompts = ("sBe brief.uHello", "sBe brief.uHello", "sShout.uHello", "uHello")
    model = TextModel(loaded)
    assert answers == [model.generate(prompt, 4, temperature=0) for prompt in prompts]


def test_commands_are_told_on_stderr_and_what_is_none_is_not_sent(says) -> None:
    answers, told = says("/help", "/halp", "", "  ")
    assert answers == []
    assert "/system TEXT" in told
    assert "[/halp is no command; there are /reset, /system, /help, /exit]" in told


def test_exit_ends_it_before_the_input_does(says) -> None:
    answers, _ = says("Hello", "/exit", "Hello")
    assert len(answers) == 1


def test_the_oldest_turns_are_forgotten_with_a_line_that_says_so(says) -> None:
    line = "a b c d e f g h i j k l m n o p q r s t u v"
    answers, told = says(line, line, line)
    assert len(answers) == 3
    assert "longer than the context of 64 tokens: its oldest 2 messages are forgotten]" in told
    answers, told = says("a " * 100, "Hello")
    assert len(answers) == 1
    assert "[the message is too long" in told


def test_memory_is_taken_for_the_context_that_is_asked_for_and_not_for_the_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    capacities: list[int] = []

    def new_cache(model: LanguageModel, batch_size: int, capacity: int) -> KVCache:
        capacities.append(capacity)
        return KVCache(model.config, model.grid, batch_size, capacity, dtype=torch.float32)

    monkeypatch.setattr(decoding, "new_cache", new_cache)
    (tmp_path / "plain.jinja").write_text(TEMPLATE)
    long = save_gpt(tmp_path / "gpt", max_seq_len=8192)
    line = "a b c d e f g h i j k l m n o p q r s t u v\n"
    given = ["--checkpoint", long, "--max-new-tokens", 4, "--chat-template", "plain.jinja"]
    monkeypatch.chdir(tmp_path)
    for option, capacity in ((["--context", 64], 64), ([], 4096)):
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, [*given, *option])])
        monkeypatch.setattr(sys, "stdin", io.StringIO(line * 3))
        chat.main()
        output = capsys.readouterr()
        assert len(output.out.splitlines()) >= 3
        forgotten = "longer than the context of 64 tokens: its oldest 2 messages are forgotten]"
        assert (forgotten in output.err) == (capacity == 64)
        assert set(capacities) == {capacity}
        capacities.clear()


def test_a_line_that_is_not_utf_8_is_refused_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loaded: LoadedModel,
    template: ChatTemplate,
) -> None:
    config = GenerationConfig(max_new_tokens=2)
    session = chat.Session(loaded, Chat(loaded.tokenizer, template), config, AS_IN_TRAINING, 64)
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHello\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    chat.talk(session)
    assert capsys.readouterr().err == "[the line is not UTF-8]\n"
    assert session.turns[0] == Message("user", "Hello")


def test_every_answer_has_a_seed_after_the_largest_that_can_be_given(
    loaded: LoadedModel, template: ChatTemplate
) -> None:
    talks, first = Chat(loaded.tokenizer, template), 2**63 - 1
    config = GenerationConfig(max_new_tokens=4, temperature=1.0, seed=first)
    session = chat.Session(loaded, talks, config, AS_IN_TRAINING, 64)
    generator = TextGenerator(loaded.model)
    for seed in (first, first + 1, first + 2):
        answer = "".join(session.answer("Hello"))
        prompt = talks.encode(tuple(session.turns[:-1]))
        (expected,) = generator.generate([prompt], config, seeds=[seed])
        assert answer == loaded.tokenizer.decode(expected)


def test_answers_go_into_a_file_without_the_prompts_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    loaded: LoadedModel,
    template: ChatTemplate,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    config = GenerationConfig(max_new_tokens=4, temperature=0)
    session = chat.Session(loaded, Chat(loaded.tokenizer, template), config, AS_IN_TRAINING, 64)
    monkeypatch.setattr(sys, "stdin", Terminal("Hello\nWhy?\n"))
    chat.talk(session)
    output = capsys.readouterr()
    answers = [turn.content for turn in session.turns if turn.role == "assistant"]
    assert output.out == "".join(f"{answer}\n" for answer in answers)
    assert output.err == "> > > \n"


def test_a_template_that_writes_nothing_is_named(loaded: LoadedModel) -> None:
    silent = Chat(loaded.tokenizer, ChatTemplate("", "silent"))
    with pytest.raises(DataError, match="silent writes nothing for this conversation"):
        silent.encode((Message("user", "Hello"),))


def test_an_answer_ends_before_the_text_that_its_template_ends_it_with(
    says, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loaded: LoadedModel
) -> None:
    """And what is remembered of it is without it, so that it is not there twice."""
    (whole,), _ = says("Hello")
    end = whole[3:].strip()
    ended = f"{TEMPLATE[:-12]}{{% if m.role == 'assistant' %}}{{{{ {end!r} }}}}{{% endif %}}"
    template = ChatTemplate(ended + "{% endfor %}", "ended")
    config = GenerationConfig(max_new_tokens=9, temperature=0)
    session = chat.Session(loaded, Chat(loaded.tokenizer, template), config, AS_IN_TRAINING, 64)
    assert "".join(session.answer("Hello")) == whole[: whole.index(end)]
    assert session.turns[-1] == Message("assistant", whole[: whole.index(end)])


def test_ctrl_c_ends_the_answer_and_not_the_program(says, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,), _ = says("Hello")
    stream, calls = Continuation.stream, []

    def interrupted(self, prompt, *rest, **options):
        calls.append(prompt)
        for number, token in enumerate(stream(self, prompt, *rest, **options)):
            if len(calls) == 1 and number == 2:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Continuation, "stream", interrupted)
    (cut, second), told = says("Hello", "Why?")
    assert "[stopped]" in told
    assert whole.startswith(cut)
    assert 0 < len(cut) < len(whole)
    assert second
    assert TOKENIZER.decode(calls[1]) == f"uHelloa{cut}uWhy?"


def test_a_model_without_a_template_gets_alpacas(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    loaded: LoadedModel,
) -> None:
    given = ["--checkpoint", str(checkpoint), "--max-new-tokens", "3", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *given])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a colour.\n"))
    chat.main()
    output = capsys.readouterr()
    assert "Alpaca's is used" in output.err
    alpaca = Chat(TOKENIZER, load_chat_template(TOKENIZER, "alpaca"))
    text = TOKENIZER.decode(alpaca.encode((Message("user", "Name a colour."),)))
    assert output.out == TextModel(loaded).generate(text, 3, temperature=0) + "\n"


def test_an_answer_sees_as_much_as_a_memory_is_told_to_hold(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    egpt = save_egpt(tmp_path, checkpoint, like=CONFIGS["egpt_memory"])
    given = ["--max-new-tokens", "3", "--temperature", "0", "--memory-tokens", "40"]
    monkeypatch.setattr(sys, "argv", ["chat.py", "--checkpoint", str(egpt), *given])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a colour.\n"))
    chat.main()
    output = capsys.readouterr()
    assert "token memory: up to 40 tokens in" in output.err
    alpaca = Chat(TOKENIZER, load_chat_template(TOKENIZER, "alpaca"))
    text = TOKENIZER.decode(alpaca.encode((Message("user", "Name a colour."),)))
    model = TextModel(load_for_inference(egpt, ProcessGrid()))
    assert output.out == model.generate(text, 3, temperature=0, memory_tokens=40) + "\n"


def test_a_memory_is_asked_of_a_model_that_has_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    given = ["--checkpoint", str(checkpoint), "--memory-dtype", "int8"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *given])
    with pytest.raises(SystemExit):
        chat.main()
    assert "are for an egpt with token_memory" in capsys.readouterr().err
