"""Two tasks in the files they are published as: LAMBADA's last words and HellaSwag's endings.

Prompts and measures are those of EleutherAI's lm-evaluation-harness (``lambada_openai``,
``hellaswag``).
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megaegpt.data.readers.documents import Problems
from megaegpt.data.readers.inputs import read_lines
from megaegpt.data.readers.json_lines import parse_object
from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import Pair, Scorer, encode_pair
from megaegpt.files import is_special

T = TypeVar("T")

_LAST_WORD_FIELDS = "text"
_CHOICE_FIELDS = "activity_label, ctx_a, ctx_b, endings and label"


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

    @property
    def error(self) -> float:
        """Share of the words that are not."""
        return 1 - self.accuracy

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

    @property
    def error(self) -> float:
        """Share in which it has not the least nats per character."""
        return 1 - self.accuracy_norm

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.4f}, accuracy by length {self.accuracy_norm:.4f} over "
            f"{self.examples:,} descriptions"
        )


TaskResult = LastWordResult | ChoiceResult
"""Measures of a task, whose ``error`` compares models: the lower, the better."""


class Task(NamedTuple):
    """The examples of a file, and how those of its form are scored."""

    examples: Sequence[Any]
    pairs: Callable[[Scorer, Sequence[Any]], list[Pair]]
    """What the scorer is asked for them."""
    score: Callable[[Scorer, Sequence[Any], str | None], TaskResult]
    """Their measures; the text is the title of a progress bar. Collective over all ranks."""


def read_task(path: Path) -> Task:
    """A file of either form, told from the fields of its first line.

    Raises:
        DataError: of :func:`read_lambada` and :func:`read_hellaswag`.
    """
    first, *_ = _read(path, dict, f"{_LAST_WORD_FIELDS}, or {_CHOICE_FIELDS}")
    if "endings" in first:
        return Task(read_hellaswag(path), choice_pairs, score_hellaswag)
    return Task(read_lambada(path), last_word_pairs, score_lambada)


def read_lambada(path: Path) -> list[LastWord]:
    """``{"text": ...}`` a line.

    Raises:
        DataError: the file cannot be read, is empty, or a line is not of this form.
    """
    return _read(path, _last_word, _LAST_WORD_FIELDS)


def _last_word(row: dict[str, Any]) -> LastWord:
    context, space, word = row["text"].rstrip().rpartition(" ")
    if not context or not word:
        raise ValueError("text needs two words")
    return LastWord(context, space + word)


def read_hellaswag(path: Path) -> list[Choice]:
    """``{"activity_label": ..., "ctx_a": ..., "ctx_b": ..., "endings": [...], "label": 0}`` a line.

    Raises:
        DataError: the file cannot be read, is empty, or a line is not of this form.
    """
    return _read(path, _choice, _CHOICE_FIELDS)


def _choice(row: dict[str, Any]) -> Choice:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = tuple(_clean(ending) for ending in row["endings"])
    label = int(row["label"])
    if not 0 <= label < len(endings):
        raise ValueError(f"label {label} of {len(endings)} endings")
    if empty := [number for number, ending in enumerate(endings) if not ending.strip()]:
        raise ValueError(f"ending {empty[0]} has no text, or none outside of [brackets]")
    return Choice(_clean(context), endings, label)


def _clean(text: str) -> str:
    """WikiHow's artefacts taken out, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _read(path: Path, parse: Callable[[dict[str, Any]], T], needed: str) -> list[T]:
    if is_special(path):
        raise DataError(f"{path} is a pipe or a device, not a file")
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


def score_lambada(
    scorer: Scorer, examples: Sequence[LastWord], title: str | None = "passages"
) -> LastWordResult:
    """Collective over all ranks; ``title`` is that of a progress bar."""
    scores = scorer.score(last_word_pairs(scorer, examples), title)
    nats = -sum(score.log_likelihood for score in scores) / len(scores)
    known = _all_known(score.log_likelihood for score in scores)
    return LastWordResult(
        accuracy=sum(score.greedy for score in scores) / len(scores) if known else math.nan,
        perplexity=math.exp(min(nats, 700.0)),
        examples=len(scores),
    )


def score_hellaswag(
    scorer: Scorer, examples: Sequence[Choice], title: str | None = "endings"
) -> ChoiceResult:
    """Collective over all ranks; ``title`` is that of a progress bar."""
    likelihoods = [s.log_likelihood for s in scorer.score(choice_pairs(scorer, examples), title)]
    if not _all_known(likelihoods):  # the largest of them would be any
        return ChoiceResult(math.nan, math.nan, len(examples))
    remaining = iter(likelihoods)
    right = right_by_length = 0
    for example in examples:
        sums = [next(remaining) for _ in example.endings]
        by_length = [s / len(ending) for s, ending in zip(sums, example.endings, strict=True)]
        right += sums.index(max(sums)) == example.label
        right_by_length += by_length.index(max(by_length)) == example.label
    return ChoiceResult(right / len(examples), right_by_length / len(examples), len(examples))


def last_word_pairs(scorer: Scorer, examples: Sequence[LastWord]) -> list[Pair]:
    """What is scored of each passage."""
    return [encode_pair(scorer.tokenizer, e.context, e.word) for e in examples]


def choice_pairs(scorer: Scorer, examples: Sequence[Choice]) -> list[Pair]:
    """What is scored of each ending of each description."""
    return [
        encode_pair(scorer.tokenizer, example.context, f" {ending}")
        for example in examples
        for ending in example.endings
    ]


def _all_known(likelihoods: Iterable[float]) -> bool:
    return not any(map(math.isnan, likelihoods))
