"""lm-evaluation-harness with a model of ours gives what it gives with the same weights in
transformers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="pip install lm_eval[hf] to run the harness' tests")
pytest.importorskip("accelerate", reason="pip install lm_eval[hf]: its own model is compared with")
pytest.importorskip("peft", reason="pip install lm_eval[hf]: its own model is compared with")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.errors import ConfigError, DataError
from megaegpt.evaluation.generation_options import read_options
from megaegpt.evaluation.harness import HarnessModel, measures, rolling_pairs, run_harness
from megaegpt.generation.sampling import candidates
from megaegpt.generation.trained import load_for_inference
from megaegpt.interop.export import export_huggingface
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.models import GPT, variant
from tests.tiny.tokenizers import trained_tokenizer

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
QUESTIONS = [
    {"question": "The cat sat on the", "choices": ["mat", "sea", "very old moon"], "answer": 0},
    {"question": "Snow is", "choices": ["white", "black and loud", "hot"], "answer": 2},
    {"question": "Two and two are", "choices": ["four", "a", "five of them"], "answer": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PERPLEXITY = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{choices}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
LONG = "It was a dark and stormy night; the rain fell in torrents, " * 6


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in our form and in theirs, a Llama's with a tokenizer of its own, and two tasks."""
    folder = tmp_path_factory.mktemp("harness")
    config = replace(GPT, vocab_size=50257, hidden_size=16, num_heads=2, max_seq_len=32)
    extra = {}
    if request.param == "llama":
        blocks = variant("multi_query", "rotary", config)
        blocks = replace(blocks, norm="rms_norm", mlp="swiglu", bias=False)
        config = replace(blocks, vocab_size=trained_tokenizer().vocab_size)
        extra = {"tokenizer_fingerprint": trained_tokenizer().fingerprint}
    grid = ProcessGrid()
    save_weights(build_model(config, grid, seed=1), folder / "ours", grid, extra)
    if extra:
        save_tokenizer(trained_tokenizer(), folder / "ours")
    export_huggingface(folder / "ours", folder / "theirs")
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("perplexity", PERPLEXITY)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def ours(folder: Path, grid: ProcessGrid | None = None) -> HarnessModel:
    grid = grid or ProcessGrid()
    return HarnessModel(load_for_inference(folder / "ours", grid), grid, 2, torch.float32)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return HFLM(str(folder / "theirs"), device="cpu", dtype="float32", batch_size=1)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


PAIRS = [("The cat sat on the ", "mat"), ("", "Snow"), (LONG, " and it was cold"), ("a", " b")]
GREEDY = {"until": ["\n\n", "the"], "max_gen_toks": 12}


def test_every_kind_of_request_is_answered_as_by_the_same_weights(
    folder: Path, theirs: Any
) -> None:
    model = ours(folder)
    pairs = requests("loglikelihood", *PAIRS)
    for (nats, greedy), (their_nats, their_greedy) in zip(
        model.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert nats == pytest.approx(their_nats, rel=1e-4)
        assert greedy == their_greedy
    texts = requests("loglikelihood_rolling", (LONG,), ("Short.",))
    assert model.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts), rel=1e-4
    )
    prompts = requests("generate_until", ("It was", GREEDY), ("The cat sat", GREEDY))
    assert model.generate_until(prompts) == theirs.generate_until(prompts)


def test_local_tasks_have_the_measures_of_the_same_weights(folder: Path, theirs: Any) -> None:
    tasks = ["local_choice", "local_perplexity"]
    found = run_harness(ours(folder), tasks, folder / "tasks")
    expected = run_harness(theirs, tasks, folder / "tasks")
    for task in tasks:
        assert measures(found[task]) == pytest.approx(measures(expected[task]), rel=1e-4)
    assert set(measures(found["local_choice"])) == {"acc", "acc_norm"}
    assert measures(found["local_perplexity"])["bits_per_byte"] > 0


def test_every_filter_of_a_measure_has_its_number() -> None:
    found = {
        "alias": "gsm8k",
        "sample_len": 3,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": "N/A",
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": 0.1,
        "f1,strict-match": 0.75,
        "acc,none": 1.0,
        "acc,last": 0.0,
    }
    assert measures(found) == {
        "exact_match (strict-match)": 0.25,
        "exact_match (flexible-extract)": 0.5,
        "f1": 0.75,
        "acc": 1.0,
        "acc (last)": 0.0,
    }


def _answer(folder: Path) -> tuple[Any, ...]:
    model = ours(folder, grid_for(2))
    return (
        torch.tensor(model.loglikelihood(requests("loglikelihood", *PAIRS))),
        model.generate_until(requests("generate_until", ("It was", GREEDY), ("A", GREEDY))),
    )


def test_ranks_share_the_requests(folder: Path, distributed: Distributed) -> None:
    model = ours(folder)
    alone = torch.tensor(model.loglikelihood(requests("loglikelihood", *PAIRS)))
    texts = model.generate_until(requests("generate_until", ("It was", GREEDY), ("A", GREEDY)))
    for scores, written in distributed(4, _answer, folder):
        assert torch.allclose(scores, alone, rtol=1e-5)
        assert written == texts


def test_a_text_is_covered_once_and_the_last_window_is_full() -> None:
    pairs = rolling_pairs(list(range(1, 12)), first=0, room=4)
    assert [token for _, continuation in pairs for token in continuation] == list(range(1, 12))
    assert pairs[-1] == ([7, 8], [9, 10, 11])
    assert {len(context) + len(continuation) for context, continuation in pairs} == {5}
    assert rolling_pairs([], first=0, room=4) == []


def test_an_unknown_task_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="no task nonsense"):
        run_harness(ours(folder), ["nonsense"], folder / "tasks")


class _TaskLoader(yaml.CSafeLoader):
    """Reads a task's file without the functions that it names."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def shipped_options() -> list[dict[str, Any]]:
    """Every distinct ``generation_kwargs`` in the installed harness' task files."""
    found = {}
    for path in sorted((Path(lm_eval.__file__).parent / "tasks").rglob("*")):
        if path.suffix not in ("", ".yaml", ".yml") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if "\ngeneration_kwargs:" not in text:
            continue
        options = yaml.load(text, _TaskLoader).get("generation_kwargs")
        if isinstance(options, dict):
            found[json.dumps(options, sort_keys=True)] = options
    return list(found.values())


def _shortened(options: dict[str, Any], number: int, ends: list[str]) -> dict[str, Any]:
    """For a context of 32 tokens, and in two of three with an end that the model writes."""
    names = [n for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if n in options]
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    until += [ends[number % len(ends)]] if number % 3 else []
    return options | {"until": until, (names or ["max_gen_toks"])[0]: 5 + number % 4}


def test_the_options_of_all_shipped_tasks_mean_what_they_mean_to_the_harness(
    folder: Path, theirs: Any
) -> None:
    model, shipped = ours(folder), shipped_options()
    assert len(shipped) > 50
    (long_text,) = model.generate_until(
        requests("generate_until", (LONG, {"max_gen_toks": 8, "until": []}))
    )
    ends = [long_text[3:5], long_text[-2:], "the"]
    offered = [o for o in shipped if o.get("num_beams", 1) == 1]
    assert len(offered) >= len(shipped) - 3
    asked = []
    for number, options in enumerate(offered):
        if not read_options(options).config.temperature:
            context = (LONG, "It was", "Snow<|endoftext|>The cat")[number % 3]
            asked.append((context, _shortened(options, number, ends)))
    prompts = requests("generate_until", *asked)
    for one, their_text, our_text in zip(
        asked, theirs.generate_until(prompts), model.generate_until(prompts), strict=True
    ):
        assert our_text == their_text, one


def _combinations() -> Iterator[dict[str, Any]]:
    """Every choice of the options that decide a token, beside every name of the length."""
    for values in itertools.product(
        (None, False, True), (None, 0, 0.0, "0.0", 0.7, 1), (None, 0, 5), (None, 0.9), LENGTHS
    ):
        names = ("do_sample", "temperature", "top_k", "top_p")
        options = {n: v for n, v in zip(names, values[:-1], strict=True) if v is not None}
        yield options | {values[-1]: 3, "until": []}


@pytest.mark.long
def test_every_combination_of_options_means_what_it_means_to_the_harness(
    folder: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either both take the likeliest tokens, or both draw, or both refuse."""
    model, compared, drawn = ours(folder), 0, []
    monkeypatch.setattr(
        torch, "multinomial", lambda p, num_samples: drawn.append(p) or p.argmax(-1, keepdim=True)
    )
    (greedy,) = model.generate_until(requests("generate_until", ("It was", {"max_gen_toks": 3})))
    for options in _combinations():
        drawn.clear()
        try:
            (their_text,) = theirs.generate_until(requests("generate_until", ("It was", options)))
        except ValueError:  # sampled at a temperature of 0
            with pytest.raises(ConfigError, match="temperature"):
                read_options(options)
            continue
        samples = read_options(options).config.temperature > 0
        assert samples == bool(drawn), options
        if not samples:
            assert their_text == greedy, options
            compared += 1
        assert read_options(options).config.max_new_tokens == 3
    assert compared > 50


def test_sampling_draws_from_the_probabilities_of_the_harness(
    folder: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = [
        o for o in shipped_options() if read_options({**o, "num_beams": 1}).config.temperature
    ]
    assert shipped
    sampled = [{"do_sample": o.get("do_sample"), **o} for o in shipped]
    sampled += [{"do_sample": True, "temperature": 1.3, "top_k": k} for k in (0, 1, 7, None)]
    sampled += [{"do_sample": True, "temperature": 0.5, "top_p": p} for p in (0, 0.3, 1.0)]
    model = load_for_inference(folder / "ours", ProcessGrid())
    tokens = torch.tensor([model.tokenizer.encode("It was")])
    seen: list[torch.Tensor] = []

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        seen.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    with torch.inference_mode():
        logits = model.model.head.full_logits(model.model.hidden_states(tokens)[:, -1])
        logits = logits[:, : model.tokenizer.vocab_size]
        for options in sampled:
            kept, ids = candidates(logits, read_options(options).config)
            probabilities = torch.zeros_like(logits)
            probabilities.scatter_(
                1, torch.arange(logits.shape[1])[None] if ids is None else ids, kept
            )
            with monkeypatch.context() as patched:
                patched.setattr(torch, "multinomial", multinomial)
                seen.clear()
                short = {**options, "max_gen_toks": 1, "until": []}
                short.pop("max_new_tokens", None)
                theirs.generate_until(requests("generate_until", ("It was", short)))
            expected = probabilities / probabilities.sum()
            torch.testing.assert_close(expected, seen[0], rtol=1e-3, atol=1e-7, msg=str(options))


def test_what_the_harness_refuses_and_what_is_not_offered_is_one_line(folder: Path) -> None:
    model = ours(folder)
    for options, message in (
        ({"max_gen_toks": 32}, "up to 32 new tokens .* the model sees 32"),
        ({"num_beams": 4}, "only num_beams=1"),
        ({"temperature": 1.0, "top_p": 1.5, "max_gen_toks": 2}, "top_p=1.5"),
        ({"temperature": 1.0, "top_k": -1, "max_gen_toks": 2}, "top_k=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate_until(requests("generate_until", ("It was", options)))


def test_a_sampled_text_depends_on_its_number_and_on_no_other_request(folder: Path) -> None:
    sampled = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_gen_toks": 6}
    contexts = ("It was a dark", "It", "It was a dark", "A cat and a dog")
    asked = requests("generate_until", *((context, sampled) for context in contexts))
    texts = ours(folder).generate_until(asked)
    assert texts[0] != texts[2]
    assert ours(folder).generate_until(asked[:3]) == texts[:3]


def test_the_name_of_the_end_of_text_is_its_token_as_for_the_harness(
    folder: Path, theirs: Any
) -> None:
    model = ours(folder)
    pairs = [("", "<|endoftext|>Snow"), ("The<|endoftext|>cat", " sat<|endoftext|>")]
    asked = requests("loglikelihood", *pairs)
    for found, wanted in zip(model.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=1e-4)
    texts = requests("loglikelihood_rolling", ("It was.<|endoftext|>Snow is",))
    assert model.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts), rel=1e-4
    )
