"""The server by its real client: what it answers, to how many, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from megaegpt.data.instruction.chat_template import ChatTemplate
from megaegpt.data.instruction.conversations import Conversation
from megaegpt.errors import ChatTemplateError
from megaegpt.generation.chat import Chat
from megaegpt.generation.text_model import TextModel
from megaegpt.serving.http_app import MOST_BODY_BYTES, is_loopback
from tests.serving.server import LOADED, NAME, Server, serving, wait_until
from tests.tiny.loaded import load, load_speaking

PROMPT = "Well, Prince,"
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT = {"model": NAME, "prompt": PROMPT, "max_tokens": 3}


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if messages[-1]['role'] == 'assistant' and add_generation_prompt %}"
    "{{ raise_exception('the last turn must be of the user') }}{% endif %}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    chat = Chat(LOADED.tokenizer, ChatTemplate(TEMPLATE, "plain"))
    with serving(chat=chat) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def alone(prompt: str, tokens: int) -> str:
    return TextModel(LOADED).generate(prompt, tokens, temperature=0)


# -- what is answered ------------------------------------------------------------------------------


def test_a_completion_is_the_text_that_the_model_writes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == alone(PROMPT, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 12, 16)
    ids = LOADED.tokenizer.encode(PROMPT)
    by_ids = client.completions.create(model=NAME, prompt=ids, max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == answer.choices[0].text


def test_64_requests_at_once_get_what_each_gets_alone(server: Server) -> None:
    """Greedy and drawn, of lengths and prompts of their own, by rows that come and go."""
    words = "the a it Prince Genoa and Lucca are now no more than private estates".split()  # noqa: SIM905
    texts = [" ".join(words[: n % 11 + 1]) for n in range(64)]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        answer = await client.completions.create(
            model=NAME, prompt=texts[number], max_tokens=number % 4 + 1,
            temperature=number % 2, seed=number,
        )  # fmt: skip
        return answer.choices[0].text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    for number, text in enumerate(asyncio.run(ask_all())):
        expected = TextModel(LOADED).generate(
            texts[number], number % 4 + 1, temperature=number % 2, top_k=None, seed=number
        )
        assert text == expected, number
    assert server.batcher.counts() == (0, 0)


def test_a_request_that_names_no_model_is_for_the_one_that_is_served(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for path, asked in ((COMPLETE, {"prompt": PROMPT}), (CHAT, {"messages": messages})):
        for model in ({}, {"model": None}):
            status, _, body = server.ask("POST", path, asked | model | {"max_tokens": 1})
            assert (status, json.loads(body)["model"]) == (200, NAME)


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=9, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last, usage = list(stream)
    assert len(chunks) > 3
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone(PROMPT, 9)
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 9


def test_a_chat_is_answered_whole_and_in_pieces(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    options: Any = {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0}
    expected = alone("system: Be brief.\nuser: Hello\n", 8)
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    first, *chunks = client.chat.completions.create(**options, stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    again = [*messages, answer.choices[0].message, {"role": "user", "content": "And"}]
    assert client.chat.completions.create(**options | {"messages": again}).usage.prompt_tokens > 20


def test_an_answer_ends_before_the_text_that_its_template_ends_it_with() -> None:
    text = alone("user: Hi\n", 12)
    end = text[4:9].strip()
    ended = TEMPLATE.replace("+ '\\n'", f"+ ({end!r} if m['role'] == 'assistant' else '') + '\\n'")
    chat = Chat(LOADED.tokenizer, ChatTemplate(ended, "ended"))
    asked = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 12}
    with serving(chat=chat) as server:
        choice = json.loads(server.ask("POST", CHAT, asked)[2])["choices"][0]
    assert choice["message"]["content"] == text[: text.index(end)]
    assert choice["finish_reason"] == "stop"


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    text = alone(PROMPT, 12)
    stop = text[8:14]
    for stream in (False, True):
        answer: Any = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=12, temperature=0, stop=["\0", stop],
            stream=stream,
        )  # fmt: skip
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


@torch.inference_mode()
def test_log_probabilities_are_the_models(client: openai.OpenAI) -> None:
    ids = LOADED.tokenizer.encode(PROMPT)
    hidden = LOADED.model.hidden_states(torch.tensor([ids]))
    logprobs = LOADED.model.head.full_logits(hidden[:, -1])[0].log_softmax(-1)
    best = logprobs.topk(3)
    names = [LOADED.tokenizer.decode([token]) for token in best.indices.tolist()]
    answer = client.completions.create(
        model=NAME, prompt=ids, max_tokens=2, temperature=0, logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found.tokens[0] == names[0]
    assert found.token_logprobs[0] == pytest.approx(best.values[0].item(), abs=1e-5)
    assert found.top_logprobs[0] == pytest.approx(
        dict(zip(names, best.values.tolist(), strict=True)), abs=1e-5
    )
    assert found.text_offset == [0, len(names[0])]
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Hi"}], max_tokens=2, logprobs=True,
        top_logprobs=2, temperature=0,
    )  # fmt: skip
    tokens = chat.choices[0].logprobs.content
    assert len(tokens) == 2
    assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob
    assert bytes(tokens[0].bytes).decode() == tokens[0].token


def test_an_answer_has_as_many_tokens_as_there_is_room_for(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Hi"}], temperature=0
    )
    assert answer.usage.total_tokens == 40


def test_models_and_health(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    status, _, body = server.ask("GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok", "running": 0, "waiting": 0})


def test_an_egpt_takes_a_document_of_any_length() -> None:
    loaded = load("egpt")
    ids = list(range(5, 85)) * 6
    with serving(loaded) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        answer = client.completions.create(model=NAME, prompt=ids, max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens == 480
    assert answer.usage.completion_tokens == 4


# -- what is refused -------------------------------------------------------------------------------

BAD_REQUESTS: list[tuple[str, Any, int, str | None, str]] = [
    (COMPLETE, b"{", 400, None, "not JSON"),
    (COMPLETE, b"[" * 100_000, 400, None, "not JSON"),
    (COMPLETE, b'{"model": "\xff"}', 400, None, "not JSON"),
    (COMPLETE, [], 400, None, "object"),
    (COMPLETE, {"model": NAME}, 400, "prompt", "required"),
    (COMPLETE, SHORT | {"prompt": 3}, 400, "prompt", "valid"),
    (COMPLETE, SHORT | {"prompt": ["a", "b"]}, 400, "prompt", "one prompt"),
    (COMPLETE, SHORT | {"prompt": []}, 400, "prompt", "at least one"),
    (COMPLETE, SHORT | {"prompt": [50257]}, 400, "prompt", "0 to 50256"),
    (COMPLETE, SHORT | {"prompt": [-1]}, 400, "prompt", "0 to 50256"),
    (COMPLETE, SHORT | {"prompt": "a " * 50}, 400, "prompt", "context is 40 tokens"),
    (COMPLETE, SHORT | {"max_tokens": 37}, 400, "prompt", "37 of the answer"),
    (COMPLETE, SHORT | {"max_tokens": "3"}, 400, "max_tokens", "integer"),
    (COMPLETE, SHORT | {"max_tokens": True}, 400, "max_tokens", "integer"),
    (COMPLETE, SHORT | {"max_tokens": 0}, 400, "max_tokens", "greater"),
    (COMPLETE, SHORT | {"temperature": -0.1}, 400, "temperature", "greater"),
    (COMPLETE, json.dumps(SHORT | {"top_p": float("nan")}).encode(), 400, "top_p", "finite"),
    (COMPLETE, SHORT | {"seed": 2**63}, 400, "seed", "less"),
    (COMPLETE, SHORT | {"n": 2}, 400, "n", "only n=1"),
    (COMPLETE, SHORT | {"echo": True}, 400, "echo", "not supported"),
    (COMPLETE, SHORT | {"stop": ""}, 400, "stop", "none of them empty"),
    (COMPLETE, SHORT | {"stop": list("abcde")}, 400, "stop", "1 to 4"),
    (COMPLETE, SHORT | {"logprobs": 6}, 400, "logprobs", "less"),
    (COMPLETE, SHORT | {"stream_options": {}}, 400, "stream_options", "stream=true"),
    (COMPLETE, SHORT | {"max_new_tokens": 3}, 400, "max_new_tokens", "not a field"),
    (COMPLETE, SHORT | {"model": "gpt-4"}, 404, "model", "no model 'gpt-4'"),
    (CHAT, {"model": NAME, "messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"model": NAME, "messages": [{"role": "robot"}]}, 400, "messages", "role"),
    (CHAT, {"model": NAME, "messages": [{"role": "assistant"}]}, 400, "messages", "last turn"),
    (CHAT, {"model": NAME, "messages": "Hi"}, 400, "messages", "array"),
    ("/v1/nothing", {}, 404, None, "Not Found"),
    ("/v1/models", {}, 405, None, "Not Allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), BAD_REQUESTS)
def test_a_bad_request_is_told_what_is_wrong_with_it(
    server: Server, path: str, body: Any, status: int, param: str | None, message: str
) -> None:
    found, error = server.error_of(path, body)
    assert (found, error["param"]) == (status, param)
    assert message in error["message"]


def test_other_bodies_and_too_much_of_one_are_refused(server: Server) -> None:
    """What a page of another site can send without being asked is text or a form."""
    assert server.error_of(COMPLETE, SHORT, Content_Type="text/plain")[0] == 415
    large = SHORT | {"prompt": "a" * MOST_BODY_BYTES}
    assert server.error_of(COMPLETE, large)[0] == 413


def test_a_model_without_a_template_has_no_chat() -> None:
    with serving() as server:
        messages = [{"role": "user", "content": "Hi"}]
        status, error = server.error_of(CHAT, {"model": NAME, "messages": messages})
    assert (status, error["code"]) == (400, "no_chat_template")


def test_a_template_that_is_late_is_no_fault_of_the_request() -> None:
    class Late(Chat):
        def encode(self, messages: Conversation) -> list[int]:
            raise ChatTemplateError("the template did not end within 10 s")

    late = Late(LOADED.tokenizer, ChatTemplate(TEMPLATE, "plain"))
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    with serving(chat=late) as server:
        status, headers, body = server.ask("POST", CHAT, asked)
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["type"] == "server_error"


def test_beyond_its_queue_a_server_refuses_and_says_when_to_come_again() -> None:
    with serving(batch_size=1, queue=2, gated=True) as server:
        begun = [server.begin(COMPLETE, SHORT)]
        wait_until(lambda: server.gate.steps == 1)  # it runs, and the others wait
        begun += [server.begin(COMPLETE, SHORT) for _ in range(2)]
        wait_until(lambda: server.batcher.counts() == (1, 2))
        status, headers, body = server.ask("POST", COMPLETE, SHORT)
        assert status == 429
        assert headers["retry-after"] == "1"
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
        server.gate.is_open.set()
        assert all(b" 200 OK" in connection.recv(100) for connection in begun)
        assert server.ask("POST", COMPLETE, SHORT)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_take_their_texts_with_them(stream: bool) -> None:
    """The one that runs, the one that waits, and not the one that stays."""
    with serving(batch_size=2, gated=True) as server:
        request = SHORT | {"max_tokens": 30, "stream": stream}
        leaving = [server.begin(COMPLETE, request)]
        wait_until(lambda: server.gate.steps == 1)
        staying = server.begin(COMPLETE, SHORT)
        leaving += [server.begin(COMPLETE, request) for _ in range(3)]
        wait_until(lambda: server.batcher.counts() == (1, 4))
        for connection in leaving:
            connection.close()
        wait_until(lambda: len(server.uvicorn.server_state.connections) == 1)
        server.gate.is_open.set()
        assert b" 200 OK" in staying.recv(100)
        wait_until(lambda: server.batcher.counts() == (0, 0))
        assert server.gate.steps < 20


def test_a_request_has_its_time_and_no_more() -> None:
    with serving(batch_size=1, gated=True, timeout=0.2) as server:
        running, waiting = (server.begin(COMPLETE, SHORT | {"stream": s}) for s in (True, False))
        wait_until(lambda: server.gate.steps == 1)
        streamed = running.recv(10_000)
        assert b" 200 OK" in streamed  # it has begun
        time.sleep(0.25)
        server.gate.is_open.set()
        assert b" 504 " in waiting.recv(100)
        while b"[DONE]" not in streamed and b'"error"' not in streamed:
            streamed += running.recv(10_000)
        assert b'"code": "timeout"' in streamed


def test_a_fault_of_the_server_ends_what_it_touched_and_shows_nothing_of_itself() -> None:
    with serving(gated=True) as server:
        server.gate.fault = ZeroDivisionError("secret")
        status, error = server.error_of(COMPLETE, SHORT)
        assert (status, error["type"]) == (500, "server_error")
        assert "secret" not in error["message"]
        server.gate.is_open.set()
        assert server.ask("POST", COMPLETE, SHORT)[0] == 200


@pytest.mark.parametrize(
    "place",
    [
        "megaegpt.serving.batcher.TextStream",
        "megaegpt.serving.batcher.Sampler.draw",
        "tests.serving.server.Gate.join",
    ],
)
def test_a_fault_while_a_text_begins_is_told_to_its_client(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    with serving() as server:
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            status, error = server.error_of(COMPLETE, SHORT)
        assert (status, error["type"]) == (500, "server_error")
        assert "secret" not in error["message"]
        assert server.ask("POST", COMPLETE, SHORT)[0] == 200


def test_a_model_without_probabilities_writes_no_text() -> None:
    loaded = load_speaking("gpt")
    loaded.model.head.weight.data.fill_(float("nan"))
    with serving(loaded) as server:
        status, error = server.error_of(COMPLETE, SHORT)
        assert (status, error["message"]) == (500, "the model's logits are not finite")
        wait_until(lambda: server.batcher.counts() == (0, 0))


def test_a_server_that_ends_finishes_what_has_begun() -> None:
    with serving(gated=True) as server:
        connection = server.begin(COMPLETE, SHORT | {"stream": True})
        wait_until(lambda: server.gate.steps == 1)
        server.uvicorn.should_exit = True  # as SIGTERM does
        server.gate.is_open.set()
        answer = b""
        while piece := connection.recv(10_000):
            answer += piece
        assert b"data: [DONE]" in answer


# -- to whom ---------------------------------------------------------------------------------------


def test_a_token_is_asked_for_and_the_page_comes_without() -> None:
    with serving(token="s3cret") as server:
        for given in ({}, {"Authorization": "Bearer S3cret"}, {"Authorization": "s3cret"}):
            status, error = server.error_of(COMPLETE, SHORT, **given)
            assert (status, error["code"]) == (401, "invalid_api_key")
        client = openai.OpenAI(base_url=server.url, api_key="s3cret", max_retries=0)
        assert client.completions.create(**SHORT).choices
        assert server.ask("GET", "/v1/models")[0] == 401
        assert server.ask("GET", "/", Host="model.example.org")[0] == 200


def test_without_a_token_other_names_of_the_machine_are_not_answered(server: Server) -> None:
    for name in ("evil.example", "127.0.0.1.evil.example:80"):
        assert server.error_of(COMPLETE, SHORT, Host=name)[0] == 403
    assert server.ask("GET", "/", Host="evil.example")[0] == 403
    assert server.ask("GET", "/", Host="localhost:1")[0] == 200


def test_which_addresses_are_this_machines_own() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    status, headers, body = server.ask("GET", "/")
    page = body.decode()
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in page
    assert "https://" not in page
    assert "innerHTML" not in page
