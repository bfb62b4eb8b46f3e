"""The log-likelihood of continuations behind their contexts, for many pairs at once.

Shapes: B rows, T tokens, C hidden, V vocabulary, m predicted tokens of a batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaegpt.bars import progress_bar
from megaegpt.errors import DataError
from megaegpt.evaluation.text import inputs_of
from megaegpt.evaluation.text_loss import AbandonedEvaluationError
from megaegpt.generation.trained import LoadedModel
from megaegpt.labels import IGNORE, NOTHING_BEFORE
from megaegpt.parallel.grid import ProcessGrid

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context, at least one, and of what continues it, at least one."""


class Score(NamedTuple):
    """Of a continuation."""

    log_likelihood: float
    """In nats, over all its tokens."""
    greedy: bool
    """Each of its tokens is the likeliest."""


class TextEncoder(Protocol):
    """A tokenizer, as far as scoring needs one."""

    @property
    def first_token(self) -> int:
        """The id before a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, a part of one."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of ``text``, the begin of one."""
        ...


def encode_pair(tokenizer: TextEncoder, context: str, continuation: str) -> Pair:
    """Tokens of two texts as they are in the one text that they make.

    Spaces at the context's end belong to the continuation, as they do for GPT-2's tokens. Without a
    context it is what is before a text. A continuation that would be swallowed by the context's
    last token is encoded by itself.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        ids = tokenizer.encode(continuation)
        begins = ids[:1] == [tokenizer.first_token]  # then it is not put before them once more
        return [tokenizer.first_token], ids[1:] if begins else ids
    whole, first = tokenizer.encode_prompt(context + continuation), tokenizer.encode_prompt(context)
    return first, whole[len(first) :] or tokenizer.encode(continuation)


class Scorer:
    """Scores pairs by a GPT, EGPT or DeepGPT, shared out over data-parallel ranks.

    A context is cut on the left to what the model has room for.

    Args:
        loaded: the model.
        grid: its place.
        batch_size: pairs at once.
        dtype: what the model computes in.
    """

    def __init__(
        self, loaded: LoadedModel, grid: ProcessGrid, batch_size: int, dtype: torch.dtype
    ) -> None:
        self._model, self._grid, self._batch_size = loaded.model, grid, batch_size
        self.tokenizer = loaded.tokenizer
        self._inputs = inputs_of(loaded, dtype)
        config = loaded.model.config
        self.max_len = config.sample_len
        self._vocab_size, self._preceding = config.vocab_size, config.preceding_tokens
        few_shapes = 128 if grid.device.type == "cuda" else 1  # a kernel may be made for each
        self._multiple_of = math.lcm(config.length_multiple, few_shapes)
        self._why_end: Callable[[], str | None] = lambda: None

    def unless(self, why_end: Callable[[], str | None]) -> Scorer:
        """The same, whose :meth:`score` raises ``AbandonedEvaluationError`` when this, which every
        rank calls before each of its batches, and equally often, gives a reason on all ranks.
        """
        other = copy.copy(self)
        other._why_end = why_end
        return other

    def check(self, pairs: Sequence[Pair]) -> None:
        """Refuse pairs that cannot be scored.

        Raises:
            DataError: a continuation is empty or longer than the model's context, or has a token
                that the model does not have.
        """
        for number, (context, continuation) in enumerate(pairs):
            if not context or not 1 <= len(continuation) <= self.max_len:
                raise DataError(
                    f"pair {number}: {len(context)} and {len(continuation)} tokens cannot be "
                    f"scored; each needs one, and the model sees {self.max_len}"
                )
            if (largest := max(*context, *continuation)) >= self._vocab_size:
                raise DataError(
                    f"pair {number} has the token {largest}, and the model's vocabulary is of "
                    f"{self._vocab_size} tokens: it has another tokenizer"
                )

    @torch.no_grad()  # not inference_mode: what a model in training caches must allow gradients
    def score(self, pairs: Sequence[Pair], title: str | None = None) -> list[Score]:
        """One score a pair. Collective over all ranks, which give the same pairs.

        Args:
            title: of a progress bar.

        Raises:
            DataError: of :meth:`check`.
        """
        self.check(pairs)
        grid, size = self._grid, self._batch_size
        found = torch.zeros(2, len(pairs), dtype=torch.float64, device=grid.device)
        by_length = sorted(range(len(pairs)), key=lambda n: sum(map(len, pairs[n])), reverse=True)
        rounds = range(0, len(pairs), grid.replica_size * size)
        for start in progress_bar(
            rounds, title, unit="batch", disable=not (title and grid.is_main)
        ):
            if (reason := self._why_end()) is not None:
                raise AbandonedEvaluationError(reason)
            first = start + grid.replica_rank * size
            if numbers := by_length[first : first + size]:
                found[:, numbers] = self._score_batch([pairs[number] for number in numbers])
        if grid.replica_group is not None:
            dist.all_reduce(found, group=grid.replica_group)  # one rank has a value, the others 0
        likelihoods, greedy = found.tolist()
        return [Score(nats, bool(flag)) for nats, flag in zip(likelihoods, greedy, strict=True)]

    def _score_batch(self, pairs: list[Pair]) -> Tensor:
        """Log-likelihoods and whether they are greedy, (2, B)."""
        device = self._grid.device
        texts = [[*context, *continuation] for context, continuation in pairs]
        rows = [text[-self.max_len - 1 :] for text in texts]
        longest = max(map(len, rows)) - 1
        width = min(-(-longest // self._multiple_of) * self._multiple_of, self.max_len)
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        targets = torch.full((len(rows), width), IGNORE)
        for number, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            ids = torch.tensor(row)
            tokens[number, : len(row) - 1] = ids[:-1]
            start = len(row) - 1 - len(continuation)
            targets[number, start : len(row) - 1] = ids[start + 1 :]
        given = {"tokens": tokens, "targets": targets}
        if self._preceding:
            given["before"] = self._before(texts)
        prepared = self._inputs.prepare(given)
        batch = {name: x.to(device) for name, x in prepared.items()}
        predicted = batch["targets"] >= 0
        predictions = self._model.predictions(**self._inputs.arguments(batch))
        nats, greedy = _judge(predictions.logits(predicted), batch["targets"][predicted])
        places = predicted.flatten(1).nonzero()[:, 0]  # (m,) the row of each
        sums = torch.zeros(2, len(rows), dtype=torch.float64, device=device)
        sums[0].index_add_(0, places, nats.double())
        sums[1].index_add_(0, places, (~greedy).double())
        sums[1] = sums[1] == 0
        return sums

    def _before(self, texts: list[list[int]]) -> Tensor:
        """The last tokens (B, O) that were cut off each, of which the model is told; -1 where there
        are no more.
        """
        before = torch.full((len(texts), self._preceding), NOTHING_BEFORE)
        for row, text in zip(before, texts, strict=True):
            cut = text[: -self.max_len - 1][-self._preceding :]
            row[len(row) - len(cut) :] = torch.tensor(cut)
        return before


def _judge(blocks: Iterable[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (., V) of all targets (m,) in order -> log-likelihood of each, and whether it is the
    likeliest.
    """
    nats, greedy, start = [], [], 0
    for block in blocks:
        logits, labels = block.float(), targets[start : start + len(block)]
        nats.append(-F.cross_entropy(logits, labels, reduction="none"))
        greedy.append(logits.argmax(-1) == labels)
        start += len(block)
    return torch.cat(nats), torch.cat(greedy)
