"""Loss over a whole text: every target once, the same number whatever the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaegpt.bars import progress_bar
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.loader import DeviceMover
from megaegpt.data.tokens.windows import Windows
from megaegpt.errors import DataError
from megaegpt.labels import IGNORE
from megaegpt.model.calling import ModelInputs
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.partitions import is_partitioned


@dataclass(frozen=True)
class Evaluation:
    """The losses of a model on a text."""

    loss: float
    """Mean nats per predicted token."""
    nats_per_byte: float
    """Nats over the UTF-8 bytes of the text, or where it is given as tokens, of those predicted
    (end-of-text has none); nan where the tokenizer is not known."""
    tokens: int
    """Predicted tokens: all of a split but its first, and, if so configured, those that follow a
    document's end; of instructions, the answers'."""
    loss_by_chunk: tuple[float, ...] = ()
    """Nats per token by the chunk's number in its window; empty for gpt, nan without targets."""

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token, which is cut at 700 nats to stay finite."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the text compressed by the model; comparable across tokenizers."""
        return self.nats_per_byte / math.log(2)

    def __str__(self) -> str:
        by_byte = "n/a" if math.isnan(self.nats_per_byte) else f"{self.nats_per_byte:.4f}"
        return (
            f"validation loss {self.loss:.4f} nats/token ({by_byte} nats/byte, "
            f"perplexity {self.perplexity:.2f}) over {self.tokens:,} tokens"
        )


class AbandonedEvaluationError(Exception):
    """It was asked to end before there is a result; the message is why."""


def nothing_to_predict(name: str) -> DataError:
    """Instead of a loss of 0 over 0 tokens, which would be the best of all."""
    error = DataError(f"{name} has no token to predict (its first never is): give longer text")
    error.on_every_rank = True
    return error


class Evaluator:
    """Evaluates models of one kind on one text.

    Args:
        windows: of the text.
        num_chunks: chunks a window is reported by; 1 for gpt.
        inputs: how the model is fed.
        grid: windows are shared out over data-parallel ranks.
        batch_size: windows at once.
        token_byte_lengths: bytes of each token id; None where the tokenizer is not known.
        num_bytes: of the text, in place of those of its tokens; None where it is not known.
        trim: leaves out columns of a batch that nothing is predicted in.
        progress: shows a bar of the windows on stderr, by rank 0.
    """

    def __init__(
        self,
        windows: Windows,
        num_chunks: int,
        inputs: ModelInputs,
        grid: ProcessGrid,
        batch_size: int,
        token_byte_lengths: np.ndarray | None,
        num_bytes: int | None = None,
        progress: str | None = None,
        trim: Callable[[Batch], Batch] = dict,
    ) -> None:
        self._windows = windows
        self._num_chunks = num_chunks
        self._inputs = inputs
        self._grid = grid
        self._batch_size = batch_size
        self._byte_lengths = (
            None
            if token_byte_lengths is None
            else torch.from_numpy(np.asarray(token_byte_lengths, dtype=np.int64))
        )
        self._num_bytes = num_bytes
        self._progress = progress
        self._trim = trim

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, why_end: Callable[[], str | None] = lambda: None
    ) -> Evaluation:
        """Collective over all ranks. The model is left in the mode it was in.

        Args:
            model: in any mode.
            why_end: called by every rank before each of its batches, and equally often; a reason,
                the same on all ranks, ends the evaluation.

        Raises:
            DataError: the text has no token to predict.
            AbandonedEvaluationError: ``why_end`` gave a reason.

        Sums are kept by window and chunk and added in one order at the end, so that the result
        does not depend on which rank had which window.
        """
        device, shape = self._grid.device, (len(self._windows), self._num_chunks)
        nats = torch.zeros(shape, dtype=torch.float64, device=device)
        counts = torch.zeros((2, *shape), dtype=torch.int64)  # tokens, bytes
        was_training = model.training
        model.eval()
        mover = DeviceMover(device)
        for first in self._first_windows():
            self._go_on(model, was_training, why_end)
            rows = slice(first, min(first + self._batch_size, len(self._windows)))
            batch = self._batch(np.arange(rows.start, rows.stop))
            on_device = mover.finish(mover.start(batch))  # no copy from pageable memory: it waits
            losses = self._inputs.loss(model, on_device, "none")
            nats[rows] = self._by_chunk(losses.double())
            targets = batch["targets"]
            valid = targets != IGNORE
            counts[0, rows] = self._by_chunk(valid.long())
            if self._byte_lengths is not None:
                last = len(self._byte_lengths) - 1  # the end of text, without bytes as all beyond
                bytes_of = self._byte_lengths[targets.clamp(0, last)]
                counts[1, rows] = self._by_chunk(bytes_of.where(valid, 0))
        if self._others_have_one_more():
            self._go_on(model, was_training, why_end)
            if any(is_partitioned(parameter) for parameter in model.parameters()):
                self._pass_with_the_others(model, mover)
        model.train(was_training)
        return self._summarize(nats, counts.to(device))

    def _first_windows(self) -> Iterable[int]:
        """First windows of this rank's batches; no number of ranks decides what is in a batch."""
        size, grid = self._batch_size, self._grid
        firsts = range(grid.replica_rank * size, len(self._windows), grid.replica_size * size)
        if self._progress is None:
            return firsts
        return progress_bar(firsts, self._progress, unit="batch", disable=not grid.is_main)

    def _go_on(
        self, model: nn.Module, was_training: bool, why_end: Callable[[], str | None]
    ) -> None:
        if (reason := why_end()) is not None:
            model.train(was_training)
            raise AbandonedEvaluationError(reason)

    def _others_have_one_more(self) -> bool:
        """Whether ranks have a batch more than this one."""
        batches = -(-len(self._windows) // self._batch_size)
        return 0 < batches % self._grid.replica_size <= self._grid.replica_rank

    def _pass_with_the_others(self, model: nn.Module, mover: DeviceMover) -> None:
        """Take part in the last pass of ranks that have a batch more: ZeRO stage 3 gathers
        parameters in every pass, on all ranks together.
        """
        batch = self._batch(np.arange(min(self._batch_size, len(self._windows))))
        self._inputs.loss(model, mover.finish(mover.start(batch)), "none")

    def _batch(self, numbers: np.ndarray) -> Batch:
        windows = self._windows.batch(numbers)
        batch = {name: torch.from_numpy(array) for name, array in windows.items()}
        return self._inputs.prepare(self._trim(batch))

    def _by_chunk(self, values: Tensor) -> Tensor:
        """(n, ...) of the windows' values -> (n, N) sums."""
        return values.reshape(len(values), self._num_chunks, -1).sum(-1)

    def _summarize(self, nats: Tensor, counts: Tensor) -> Evaluation:
        if self._grid.replica_group is not None:
            dist.all_reduce(
                nats, group=self._grid.replica_group
            )  # one rank has a value, the others 0
            dist.all_reduce(counts, group=self._grid.replica_group)
        nats, (tokens, bytes_of_tokens) = nats.cpu(), counts.cpu().unbind()
        if not tokens.any():
            raise nothing_to_predict("the text that is evaluated")
        by_chunk = nats.sum(0) / tokens.sum(0)
        total = nats.sum().item()
        num_bytes = self._num_bytes
        if num_bytes is None:
            num_bytes = int(bytes_of_tokens.sum())
        return Evaluation(
            loss=total / max(1, int(tokens.sum())),
            nats_per_byte=math.nan if self._byte_lengths is None else total / max(1, num_bytes),
            tokens=int(tokens.sum()),
            loss_by_chunk=tuple(by_chunk.tolist()) if self._num_chunks > 1 else (),
        )
