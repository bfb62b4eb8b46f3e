"""LAMBADA and HellaSwag: read as published, and measured as a plain loop would."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import Score, Scorer
from megaegpt.evaluation.tasks import (
    read_hellaswag,
    read_lambada,
    read_task,
    score_hellaswag,
    score_lambada,
)
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.loaded import TOKENIZER, load_speaking, naive_score

PASSAGES = ["He went home and slept", "She took the long way to the river", "No it is not a dog"]
HELLASWAG: list[dict[str, Any]] = [
    {
        "activity_label": "Cooking",
        "ctx_a": "A man [header] cuts bread.",
        "ctx_b": "the bread",
        "endings": ["falls.", "is eaten [title] by him  all.", "flies away over the hills.", "x"],
        "label": 1,
    },
    {
        "activity_label": "Running",
        "ctx_a": "A dog runs.",
        "ctx_b": "",
        "endings": ["It stops and looks back.", "Cars.", "And runs.", "Now it sleeps."],
        "label": "2",
    },
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def loglikelihood(context: str, continuation: str) -> tuple[float, bool]:
    whole = TOKENIZER.encode(context + continuation)
    first = TOKENIZER.encode(context)
    assert whole[: len(first)] == first
    return naive_score(LOADED, first, whole[len(first) :])


LOADED = load_speaking("gpt")
SCORER = Scorer(LOADED, ProcessGrid(), 3, torch.float32)


def test_lambada_is_the_greedy_last_word(tmp_path: Path) -> None:
    examples = read_lambada(write(tmp_path / "l.jsonl", [{"text": t} for t in PASSAGES]))
    assert (examples[0].context, examples[0].word) == ("He went home and", " slept")
    result = score_lambada(SCORER, examples)
    naive = [loglikelihood(e.context, e.word) for e in examples]
    assert result.examples == 3
    assert result.accuracy == sum(greedy for _, greedy in naive) / 3
    assert result.perplexity == pytest.approx(math.exp(-sum(n for n, _ in naive) / 3), rel=1e-5)


def test_hellaswag_is_the_likeliest_ending_in_all_and_by_length(tmp_path: Path) -> None:
    examples = read_hellaswag(write(tmp_path / "h.jsonl", HELLASWAG))
    assert examples[0].context == "Cooking: A man cuts bread. The bread"
    assert examples[0].endings[1] == "is eaten. by him all."
    assert examples[1].label == 2
    result = score_hellaswag(SCORER, examples)
    right = right_by_length = 0
    for example in examples:
        sums = [loglikelihood(example.context, f" {e}")[0] for e in example.endings]
        by_length = [s / len(e) for s, e in zip(sums, example.endings, strict=True)]
        right += max(range(4), key=sums.__getitem__) == example.label
        right_by_length += max(range(4), key=by_length.__getitem__) == example.label
    assert (result.accuracy, result.accuracy_norm) == (right / 2, right_by_length / 2)


def test_the_label_decides_what_is_right(tmp_path: Path) -> None:
    rows = [HELLASWAG[1] | {"label": label} for label in range(4)]
    examples = read_hellaswag(write(tmp_path / "h.jsonl", rows))
    sums = [loglikelihood(examples[0].context, f" {e}")[0] for e in examples[0].endings]
    right = [score_hellaswag(SCORER, [example]).accuracy for example in examples]
    assert right == [float(label == sums.index(max(sums))) for label in range(4)]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_lambada, {"txt": "a b"}, "line 1: needs text"),
        (read_lambada, {"text": "word"}, "needs two words"),
        (read_hellaswag, HELLASWAG[0] | {"label": 4}, "label 4 of 4 endings"),
        (read_hellaswag, {"ctx": "a"}, "line 1: needs activity_label"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, read: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "bad.jsonl", [row]))


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no examples: each is a line with text"):
        read_lambada(tmp_path / "empty.jsonl")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_lambada, read_hellaswag, read_task):
        with pytest.raises(DataError, match="is a pipe or a device"):
            read(tmp_path / "pipe")


def test_the_form_of_a_file_is_told_from_its_first_line(tmp_path: Path) -> None:
    words = read_task(write(tmp_path / "l.jsonl", [{"text": t} for t in PASSAGES]))
    endings = read_task(write(tmp_path / "h.jsonl", HELLASWAG))
    assert words.examples == read_lambada(tmp_path / "l.jsonl")
    assert endings.examples == read_hellaswag(tmp_path / "h.jsonl")
    mixed = write(tmp_path / "m.jsonl", [HELLASWAG[0], {"text": "one two"}])
    with pytest.raises(DataError, match="line 2: needs activity_label"):
        read_task(mixed)


def test_what_is_not_known_is_no_accuracy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of log-likelihoods that are no numbers, the largest would be the first."""
    monkeypatch.setattr(SCORER, "score", lambda pairs, title: [Score(math.nan, True)] * len(pairs))
    for rows, name in (([{"text": PASSAGES[0]}], "l"), (HELLASWAG, "h")):
        task = read_task(write(tmp_path / name, rows))
        result = task.score(SCORER, task.examples, None)
        assert math.isnan(result.error)
        assert math.isnan(result.accuracy)


def test_an_ending_without_text_is_refused_before_anything_is_counted(tmp_path: Path) -> None:
    row = {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "label": 1}
    for ending in ("", " ", "[header]", " [title]"[:1] + "[step] "):
        file = tmp_path / "hellaswag.jsonl"
        file.write_text(json.dumps(row | {"endings": [ending, "d"]}) + "\n")
        with pytest.raises(DataError, match=r"line 1: .*ending 0 has no text"):
            read_hellaswag(file)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    line = json.dumps({"text": "one two"}).encode() + b"\n"
    (tmp_path / "plain").write_bytes(line * 2)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + line * 2)
    assert read_lambada(tmp_path / "marked") == read_lambada(tmp_path / "plain")
