"""lm-evaluation-harness with a model of ours gives what it gives with the same weights in
transformers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install lm_eval[hf] to run the harness' tests")
pytest.importorskip("accelerate", reason="pip install lm_eval[hf]: its own model is compared with")
pytest.importorskip("peft", reason="pip install lm_eval[hf]: its own model is compared with")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megaegpt.errors import DataError
from megaegpt.evaluation.harness import HarnessModel, measures, rolling_pairs, run_harness
from megaegpt.generation.trained import load_for_inference
from megaegpt.interop.export import export_gpt2
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for
from tests.generation.tiny_models import GPT

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in our form and in theirs, and two tasks."""
    folder = tmp_path_factory.mktemp("harness")
    config = replace(GPT, vocab_size=50257, hidden_size=16, num_heads=2, max_seq_len=32)
    save_weights(build_model(config, ProcessGrid(), seed=1), folder / "ours", ProcessGrid())
    export_gpt2(folder / "ours", folder / "theirs")
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
