"""The page, used in a browser as people use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.data.instruction.chat_template import ChatTemplate
from megaegpt.generation.chat import Chat
from megaegpt.generation.text_model import TextModel
from tests.serving.chromium import Page, find_chromium, open_page
from tests.serving.server import LOADED, NAME, serving, wait_until
from tests.tiny.loaded import load_speaking

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium (MEGAEGPT_CHROMIUM) is here"),
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TURNS = "[...document.querySelectorAll('.turn')].map(turn => [turn.className, turn.textContent])"


def say(page: Page, text: str) -> None:
    page.run("document.getElementById('text').focus(), document.getElementById('text').value = ''")
    page.call("Input.insertText", text=text)
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r")


def settings(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.run(f"document.getElementById('{name}').value = '{value}'")


IDLE = "!document.getElementById('send').hidden"


def test_a_conversation_in_the_page(tmp_path: Path) -> None:
    loaded = load_speaking("gpt")
    chat = Chat(loaded.tokenizer, ChatTemplate(TEMPLATE, "plain"))
    with (
        serving(loaded, chat=chat, token="s3cret", gated=True) as server,
        open_page(str(find_chromium()), tmp_path) as page,
    ):
        url = f"http://127.0.0.1:{server.port}/"
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && typeof ask === 'function'")
        say(page, "Hi")
        page.wait("document.querySelector('.error') !== null")  # it has not said the token
        assert "Bearer TOKEN" in page.run(TURNS)[-1][1]
        page.run("document.getElementById('reset').click()")
        settings(page, token="s3cret", temperature=0, tokens=3)
        server.gate.is_open.set()
        say(page, "<b>A</b>")
        page.wait("document.getElementById('stats').textContent.startsWith('3 tokens')")
        page.wait(IDLE)
        (question, answer) = page.run(TURNS)
        assert question == ["turn user", "<b>A</b>"]
        assert answer[0] == "turn assistant"
        assert answer[1]
        assert page.run("document.getElementById('name').textContent") == NAME
        server.gate.is_open.clear()
        say(page, "B")
        wait_until(lambda: server.batcher.counts() == (1, 0))
        page.run("document.getElementById('stop').click()")
        page.wait(IDLE)
        server.gate.is_open.set()
        wait_until(lambda: server.batcher.counts() == (0, 0))
        page.run("document.getElementById('reset').click()")
        assert page.run(TURNS) == []
        assert page.faults == []
        assert {address for address in page.requested if not address.startswith(url)} == set()


def test_a_new_conversation_during_an_answer_begins_without_it(tmp_path: Path) -> None:
    loaded = load_speaking("gpt")
    chat = Chat(loaded.tokenizer, ChatTemplate(TEMPLATE, "plain"))
    with (
        serving(loaded, chat=chat, gated=True) as server,
        open_page(str(find_chromium()), tmp_path) as page,
    ):
        page.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        page.wait("typeof model === 'object' && model !== null")
        settings(page, temperature=0, tokens=30)
        say(page, "A")
        page.wait("document.querySelector('.assistant').textContent !== ''")
        page.run("document.getElementById('reset').click()")
        page.wait(IDLE)
        assert page.run("history.length") == 0
        assert page.run(TURNS) == []


def test_a_model_without_a_template_continues_texts(tmp_path: Path) -> None:
    with serving() as server, open_page(str(find_chromium()), tmp_path) as page:
        page.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        page.wait("typeof model === 'object' && model !== null")
        settings(page, temperature=0, tokens=5)
        say(page, "Well, Prince,")
        page.wait("document.getElementById('stats').textContent.startsWith('5 tokens')")
        expected = TextModel(LOADED).generate("Well, Prince,", 5, temperature=0)
        assert page.run(TURNS)[-1][1] == expected
