"""Two tasks in the files they are published as: LAMBADA's last words and HellaSwag's endings.

Prompts and measures are those of EleutherAI's lm-evaluation-harness (``lambada_openai``,
``hellaswag``).
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megaegpt.data.readers.documents import Problems
from megaegpt.data.readers.inputs import read_lines
from megaegpt.data.readers.json_lines import parse_object
from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import Scorer, encode_pair

T = TypeVar("T")


@dataclass(frozen=True)
class LastWord:
    """Paperno et al., "The LAMBADA dataset", 2016: a passage whose last word the rest tells."""

    context: str
    word: str
    """With the space before it."""


@dataclass(frozen=True)
class Choice:
    """Zellers et al., "HellaSwag", 2019: how a description goes on."""

    context: str
    endings: tuple[str, ...]
    """Without the space before them."""
    label: int
    """The true one."""


@dataclass(frozen=True)
class LastWordResult:
    """Over all passages."""

    accuracy: float
    """Share of the words whose every token is the likeliest."""
    perplexity: float
    """Perplexity of a word: exp of the mean nats that one costs."""
    examples: int

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.4f}, perplexity of a last word {self.perplexity:.2f} over "
            f"{self.examples:,} passages"
        )


@dataclass(frozen=True)
class ChoiceResult:
    """Over all descriptions."""

    accuracy: float
    """Share in which the true ending is the likeliest."""
    accuracy_norm: float
    """Share in which it has the least nats per character."""
    examples: int

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.4f}, accuracy by length {self.accuracy_norm:.4f} over "
            f"{self.examples:,} descriptions"
        )


def read_lambada(path: Path) -> list[LastWord]:
    """``{"text": ...}`` a line.

    Raises:
        DataError: the file cannot be read, is empty, or a line is not of this form.
    """

    def parse(row: dict[str, Any]) -> LastWord:
        context, space, word = row["text"].rstrip().rpartition(" ")
        if not context or not word:
            raise ValueError("text needs two words")
        return LastWord(context, space + word)

    return _read(path, parse, "text")


def read_hellaswag(path: Path) -> list[Choice]:
    """``{"activity_label": ..., "ctx_a": ..., "ctx_b": ..., "endings": [...], "label": 0}`` a line.

    Raises:
        DataError: the file cannot be read, is empty, or a line is not of this form.
    """

    def parse(row: dict[str, Any]) -> Choice:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        endings = tuple(_clean(ending) for ending in row["endings"])
        label = int(row["label"])
        if not 0 <= label < len(endings):
            raise ValueError(f"label {label} of {len(endings)} endings")
        if empty := [number for number, ending in enumerate(endings) if not ending.strip()]:
            raise ValueError(f"ending {empty[0]} has no text, or none outside of [brackets]")
        return Choice(_clean(context), endings, label)

    return _read(path, parse, "activity_label, ctx_a, ctx_b, endings and label")


def _clean(text: str) -> str:
    """WikiHow's artefacts taken out, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _read(path: Path, parse: Callable[[dict[str, Any]], T], needed: str) -> list[T]:
    problems = Problems("fail", "removing the line")
    found = []
    for number, line in read_lines(path, problems):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        where = f"{path}, line {number}"
        row = parse_object(line, where, problems) if line.strip() else None
        if row is None:
            continue
        try:
            found.append(parse(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{where}: needs {needed} ({reason})") from None
    if not found:
        raise DataError(f"{path} has no examples: each is a line with {needed}")
    return found


def score_lambada(scorer: Scorer, examples: Sequence[LastWord]) -> LastWordResult:
    """Collective over all ranks."""
    pairs = [encode_pair(scorer.tokenizer, e.context, e.word) for e in examples]
    scores = scorer.score(pairs, "passages")
    nats = -sum(score.log_likelihood for score in scores) / len(scores)
    return LastWordResult(
        accuracy=sum(score.greedy for score in scores) / len(scores),
        perplexity=math.exp(min(nats, 700.0)),
        examples=len(scores),
    )


def score_hellaswag(scorer: Scorer, examples: Sequence[Choice]) -> ChoiceResult:
    """Collective over all ranks."""
    pairs = [
        encode_pair(scorer.tokenizer, example.context, f" {ending}")
        for example in examples
        for ending in example.endings
    ]
    scores = iter(scorer.score(pairs, "endings"))
    right = right_by_length = 0
    for example in examples:
        sums = [next(scores).log_likelihood for _ in example.endings]
        by_length = [s / len(ending) for s, ending in zip(sums, example.endings, strict=True)]
        right += sums.index(max(sums)) == example.label
        right_by_length += by_length.index(max(by_length)) == example.label
    return ChoiceResult(right / len(examples), right_by_length / len(examples), len(examples))
