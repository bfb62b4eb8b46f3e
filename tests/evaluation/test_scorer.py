"""Continuations cost what a loop over their tokens says, in any company and on any ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaegpt.errors import DataError
from megaegpt.evaluation.scorer import Pair, Score, Scorer, encode_pair
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.loaded import TOKENIZER, load, naive_score
from tests.tiny.models import CHUNK, MAX_LEN, prompt


def pairs() -> list[Pair]:
    """Of unequal lengths within a GPT's context; the last two continue as the model would."""
    lengths = [(1, 1), (3, 2), (9, 5), (12, 4), (2, 7), (6, 1)]
    return [(prompt(n, seed=2 * i), prompt(m, seed=2 * i + 1)) for i, (n, m) in enumerate(lengths)]


def likeliest(kind: str) -> Pair:
    """A context and the token that the model would write."""
    loaded, context = load(kind), prompt(4, seed=99)
    best = [naive_score(loaded, context, [token])[0] for token in range(90)]
    return context, [best.index(max(best))]


@pytest.mark.parametrize("kind", ["gpt", "egpt", "egpt_memory", "deepgpt"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_a_loop_over_tokens(kind: str, batch_size: int) -> None:
    loaded = load(kind)
    asked = [*pairs(), likeliest(kind)]
    scores = Scorer(loaded, ProcessGrid(), batch_size, torch.float32).score(asked)
    for score, (context, continuation) in zip(scores, asked, strict=True):
        nats, greedy = naive_score(loaded, context, continuation)
        assert score.log_likelihood == pytest.approx(nats, rel=1e-5)
        assert score.greedy == greedy
    assert scores[-1].greedy
    assert not all(score.greedy for score in scores)


def test_a_long_context_is_cut_on_the_left() -> None:
    scorer = Scorer(load("gpt"), ProcessGrid(), 2, torch.float32)
    context, continuation = prompt(40), prompt(3, seed=1)
    kept = context[-(MAX_LEN + 1 - 3) :]
    assert scorer.score([(context, continuation)]) == scorer.score([(kept, continuation)])


@pytest.mark.parametrize("kind", ["egpt_memory", "egpt_overlap"])
def test_a_cut_context_is_no_start_of_a_text(kind: str) -> None:
    """The loop begins its windows at whole chunks of the text, as this cut is."""
    loaded = load(kind)
    window = loaded.model.config.sample_len
    text = prompt(2 * window + 1)
    text[-4:-2] = text[window - 1 : window + 1]  # across the cut, and again where it matters
    continuation = text[-CHUNK + 2 :]
    long = text[: -CHUNK + 2], continuation
    short = prompt(5), continuation
    scores = Scorer(loaded, ProcessGrid(), 2, torch.float32).score([short, long])
    for score, pair in zip(scores, (short, long), strict=True):
        assert score.log_likelihood == pytest.approx(naive_score(loaded, *pair)[0], rel=1e-5)


def _score(kind: str, tp_size: int) -> list[Score]:
    grid = grid_for(tp_size)
    return Scorer(load(kind, grid), grid, 2, torch.float32).score(pairs())


def test_ranks_share_the_pairs_and_agree(distributed: Distributed) -> None:
    alone: Any = torch.tensor(_score("gpt", 1))
    for result in distributed(4, _score, "gpt", 2):
        assert torch.allclose(torch.tensor(result), alone, rtol=1e-5)


def test_what_cannot_be_scored_is_refused() -> None:
    scorer = Scorer(load("gpt"), ProcessGrid(), 2, torch.float32)
    for pair in (([], [1]), ([1], []), ([1], prompt(MAX_LEN + 1))):
        with pytest.raises(DataError, match="cannot be scored"):
            scorer.score([([1], [2]), pair])


def test_a_pair_has_the_tokens_of_its_text() -> None:
    first, rest = encode_pair(TOKENIZER, "Well, Prince ", "Andrew went")
    assert TOKENIZER.decode(first) == "Well, Prince"
    assert [*first, *rest] == TOKENIZER.encode("Well, Prince Andrew went")
    assert encode_pair(TOKENIZER, "a", "b") == (TOKENIZER.encode("a"), TOKENIZER.encode("b"))
    assert encode_pair(TOKENIZER, "", "Andrew") == ([50256], TOKENIZER.encode("Andrew"))
