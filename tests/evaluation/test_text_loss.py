"""Evaluation: every target of the split once, the same result however many ranks share it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megaegpt.config import EncoderConfig
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.loader import DeviceMover, Moving
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.data.tokens.windows import EvaluationWindows
from megaegpt.evaluation import text_loss
from megaegpt.evaluation.text_loss import Evaluation, Evaluator
from megaegpt.model.build import build_inputs, build_model
from megaegpt.model.calling import ModelInputs, SequenceInputs, overlapped
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import (
    CHUNK,
    CHUNKS,
    HIDDEN,
    VOCAB,
    encoder_config,
    run_config,
)

LENGTH, WINDOW = 500, CHUNK * CHUNKS
BYTES = np.arange(VOCAB) % 7


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a split that ends inside a chunk."""
    prefix = tmp_path_factory.mktemp("split") / "validation"
    with ShardWriter(prefix) as writer:
        writer.add_document(np.random.default_rng(1).integers(0, VOCAB, LENGTH).astype(np.uint16))
        writer.finish()
    return str(prefix)


class TargetsAsNats(ModelInputs):
    """A model whose loss on each token is its target's number."""

    def arguments(self, batch: Any) -> dict[str, Tensor]:
        return {}

    def loss(self, model: Any, batch: Any, reduction: str = "sum") -> Tensor:
        assert reduction == "none"
        return batch["targets"].clamp(min=0).float()


def evaluator(
    split: str,
    inputs: ModelInputs,
    grid: ProcessGrid,
    stride: int | None = None,
    **changes: Any,
) -> Evaluator:
    values: dict[str, Any] = {
        "num_chunks": CHUNKS,
        "batch_size": 2,
        "token_byte_lengths": BYTES,
    }
    values |= changes
    overlap = values.pop("overlap", 0)
    windows = EvaluationWindows(
        TokenStream([split]), WINDOW, values["num_chunks"], stride, overlap=overlap
    )
    return Evaluator(windows, inputs=inputs, grid=grid, **values)


def test_every_target_counts_once_by_token_byte_and_chunk(split: str) -> None:
    result = evaluator(split, TargetsAsNats(), ProcessGrid()).evaluate(nn.Identity())
    targets = TokenStream([split]).read(1, LENGTH - 1).astype(np.int64)
    assert result.tokens == LENGTH - 1
    assert result.loss == targets.sum() / (LENGTH - 1)
    assert result.nats_per_byte == targets.sum() / BYTES[targets].sum()
    chunk_of = np.arange(LENGTH - 1) // CHUNK % CHUNKS
    expected = [targets[chunk_of == chunk].mean() for chunk in range(CHUNKS)]
    assert result.loss_by_chunk == pytest.approx(expected, rel=1e-12)
    for batch_size in (1, 5, 100):
        other = evaluator(split, TargetsAsNats(), ProcessGrid(), batch_size=batch_size)
        assert other.evaluate(nn.Identity()) == result


def test_the_model_is_evaluated_without_dropout_and_left_as_it_was(split: str) -> None:
    config = encoder_config(dropout=0.5, max_seq_len=WINDOW)
    model = build_model(config, ProcessGrid()).train()
    measure = evaluator(split, SequenceInputs(), ProcessGrid(), num_chunks=1)
    first, second = measure.evaluate(model), measure.evaluate(model)
    assert model.training
    assert first == second
    assert first.loss_by_chunk == ()
    stream = torch.from_numpy(TokenStream([split]).read(0, LENGTH).astype(np.int64))
    model.eval()
    with torch.no_grad():
        total = sum(
            model(part[None, :-1], part[None, 1:]).item()
            for start in range(0, LENGTH - 1, WINDOW)
            if len(part := stream[start : start + WINDOW + 1])
        )
    assert first.loss == pytest.approx(total / (LENGTH - 1), rel=1e-6)


@pytest.mark.parametrize("stride", [1, 7, 24])
def test_sliding_perplexity_is_that_of_a_loop_over_the_tokens(split: str, stride: int) -> None:
    config = encoder_config(max_seq_len=WINDOW, init_std=0.4)
    model = build_model(config, ProcessGrid(), seed=4).eval()
    measure = evaluator(split, SequenceInputs(), ProcessGrid(), stride, num_chunks=1)
    text = torch.from_numpy(TokenStream([split]).read(0, LENGTH).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for t in range(1, LENGTH):
            # The window that counts token t: the first, or the first of the others to reach it.
            start = -(-max(t - WINDOW, 0) // stride) * stride
            logits = model.logits(text[None, start:t])[0, -1, :VOCAB]
            total -= logits.log_softmax(-1)[text[t]].item()
    assert measure.evaluate(model).loss == pytest.approx(total / (LENGTH - 1), rel=1e-5)


def test_batches_are_brought_to_the_device_as_training_brings_them(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU from pinned memory, beside what it computes."""
    moved: list[int] = []

    class Mover(DeviceMover):
        def start(self, batch: Batch) -> Moving:
            moved.append(len(batch["targets"]))
            return super().start(batch)

    monkeypatch.setattr(text_loss, "DeviceMover", Mover)
    made = evaluator(split, TargetsAsNats(), ProcessGrid())
    made.evaluate(nn.Identity())
    assert sum(moved) == -(-LENGTH // WINDOW)


def _evaluate(kind: str, split: str, tp_size: int) -> Evaluation:
    grid = grid_for(tp_size)
    config = run_config(kind, Path(), Path()).model
    encoder = FrozenEncoder(build_model(encoder_config(), grid, seed=1))
    inputs = build_inputs(config, encoder)
    return evaluator(split, inputs, grid).evaluate(build_model(config, grid, seed=2))


@pytest.mark.parametrize("kind", ["egpt", "deepgpt"])
def test_the_result_does_not_depend_on_the_number_of_ranks(
    split: str, kind: str, distributed: Distributed
) -> None:
    alone = distributed(1, _evaluate, kind, split, 1)[0]
    assert len(alone.loss_by_chunk) == CHUNKS
    for world_size in (2, 4):
        assert distributed(world_size, _evaluate, kind, split, 1) == [alone] * world_size
    for result in distributed(4, _evaluate, kind, split, 2):
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
        assert result.loss_by_chunk == pytest.approx(alone.loss_by_chunk, rel=1e-6)


class Store:
    """A feature store in memory."""

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self.spec = self
        self.num_chunks = len(states)

    def history(self, ids: Tensor) -> Tensor:
        return self.states[ids][..., -1, :]

    def token_states(self, ids: Tensor) -> Tensor:
        return self.states[ids]


@pytest.mark.parametrize("overlap", [0, 3])
@pytest.mark.parametrize("kind", ["egpt", "deepgpt"])
def test_stored_features_give_the_online_loss_also_of_the_partial_chunk(
    split: str, kind: str, overlap: int
) -> None:
    grid, config = ProcessGrid(), run_config(kind, Path(), Path()).model
    config = dataclasses.replace(config, encoder=EncoderConfig(overlap=overlap))
    gpt = build_model(encoder_config(max_seq_len=CHUNK + overlap), grid, seed=1)
    encoder = FrozenEncoder(gpt)
    model = build_model(config, grid, seed=2)
    count = -(-LENGTH // CHUNK)
    padded = np.zeros(count * CHUNK, np.int64)
    padded[:LENGTH] = TokenStream([split]).read(0, LENGTH)
    chunks = torch.from_numpy(padded).view(1, -1, CHUNK)
    before = (overlapped(chunks, None, overlap),) if overlap else ()
    states = encoder(chunks, *before)[0]
    assert states.shape == (count, CHUNK, HIDDEN)
    assert LENGTH % CHUNK > 1
    store: Any = Store(states)
    history: Any = Store(states[: LENGTH // CHUNK])  # what follows it is not there
    results = [
        evaluator(split, build_inputs(config, encoder, **stores), grid, overlap=overlap).evaluate(
            model
        )
        for stores in ({}, {"history": history}, {"history": history, "token_states": store})
    ]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert result.loss_by_chunk == pytest.approx(results[0].loss_by_chunk, rel=1e-6)
