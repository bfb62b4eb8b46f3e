"""What is measured along each curve of ``benchmark.py growth``, and what is counted for it.

A quantity's expected values are the model's own count of operations, the plan's bytes, or a
constant: from them follows the exponent that the measured one should have.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megaegpt.config import EGPTConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megaegpt.data.tokens.samples import PretrainingSamples
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.model.build import build_inputs, build_model, meta_model
from megaegpt.planning.allocations import TensorMeter
from megaegpt.planning.memory import estimate_memory
from megaegpt.planning.memory_trace import trace_micro_step
from tools.benchmarks.attention import train
from tools.benchmarks.common import single_grid
from tools.benchmarks.processes import Candidate, Workload

VOCAB = 512
_SEQ_LEN, _ROWS = 1024, 8
_BATCHES = 64
_CHUNK = 32


@dataclass(frozen=True)
class Point:
    """One measurement: of a workload in processes of its own, or by a function in this one."""

    x: int
    expected: dict[str, float]
    """Values to which the measured ones of these names should be proportional."""
    work: Candidate | None = None
    measured: Callable[[], dict[str, float]] | None = None
    needs: int = 0
    """Bytes, by the plan."""


Points = Callable[[int | None], Iterator[Point]]
"""Threads of a process -> the points of a curve, the smallest first."""


def _run(config: ModelConfig, ranks: int = 1, rows: int = 1, zero: int = 0) -> RunConfig:
    return RunConfig(
        model=config,
        parallel=ParallelConfig(zero_stage=zero),  # type: ignore[arg-type]
        training=TrainingConfig(
            steps=1000, global_batch_size=rows * ranks, micro_batch_size=rows, precision="fp32"
        ),
    )


def _pass_bytes(config: ModelConfig) -> int:
    """The weights, and what a forward and a backward pass need beside them."""
    step = trace_micro_step(_run(config), "fp32", None, "cpu", keeps_gradients=True)
    return 4 * step.parameters + step.peak


def _gpt(hidden: int, layers: int = 4, context: int = 128) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        max_seq_len=context,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=max(1, hidden // 64),
        positions="sinusoidal",
    )


# -- the size of the model -------------------------------------------------------------------------


def model_sizes(threads: int | None) -> Iterator[Point]:
    """A step of one GPT with 1 to 64 times the parameters in its blocks."""
    for hidden in (128, 181, 256, 362, 512, 724, 1024):
        config = _gpt(hidden // 4 * 4)
        counts = meta_model(config)
        needs = estimate_memory(_run(config, rows=_ROWS), 1, "fp32", None, "cpu").total
        operations = counts.flops_per_token() * config.max_seq_len * _ROWS
        parameters = counts.num_parameters()
        yield Point(
            parameters,
            {"seconds a step": operations, "bytes": needs, "seconds to start": parameters},
            Candidate(f"{parameters:,}", engine_step, (config, _ROWS), threads=threads),
            needs=needs,
        )


def engine_step(config: ModelConfig, rows: int, zero: int = 0) -> Workload:
    """Steps through the engine; the first belongs to the start. ``rows``: of all processes."""
    from tools.benchmarks.engines import PLAIN, build_engine

    began = time.process_time()
    with TensorMeter() as meter:
        engine = build_engine(config, rows, PLAIN | {"zero": zero})
        shape = (rows // engine.grid.dp_size, config.max_seq_len)
        tokens = torch.randint(VOCAB, shape, device=engine.grid.device)
        engine.train_step(0, [{"tokens": tokens, "targets": tokens}])
    info = {"bytes": meter.peak, "seconds to start": time.process_time() - began}
    batch = {"tokens": tokens, "targets": tokens}
    return Workload(lambda: _ignore(engine.train_step(1, [batch])), tokens.numel(), info)


def _ignore(_: object) -> None:
    pass


# -- the length of the context ---------------------------------------------------------------------


def contexts(threads: int | None) -> Iterator[Point]:
    """Loss and gradients of one sequence of 256 to 65,536 tokens under full attention."""
    for context in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        config = _gpt(128, layers=2, context=context)
        needs = _pass_bytes(config)
        yield Point(
            context,
            {"seconds a step": meta_model(config).flops_per_token() * context, "bytes": needs},
            Candidate(f"{context:,}", context_step, (config,), threads=threads),
            needs=needs,
        )


def context_step(config: ModelConfig) -> Workload:
    """As ``benchmark.py attention`` trains."""
    workload = train(config)
    return replace(workload, info={"bytes": workload.info["memory_bytes"]})


# -- the size of the corpus ------------------------------------------------------------------------


class SimulatedStream:
    """A row of tokens of any length, which are made when they are read."""

    dtype = np.dtype(np.uint16)

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        """Tokens."""
        return self._tokens

    def read_rows(self, starts: np.ndarray, rows: np.ndarray) -> None:
        """Fill each of ``rows`` (n, T) with the tokens from its start (n,) on."""
        rows[:] = (starts[:, None] + np.arange(rows.shape[1])) % VOCAB


def corpora(threads: int | None) -> Iterator[Point]:
    """Opening and drawing from a corpus of a million to a trillion tokens."""
    draw(10**6)  # imports what drawing needs
    for tokens in (10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12):
        expected = {"seconds to start": 1.0, "seconds a batch": 1.0}
        yield Point(tokens, expected, measured=functools.partial(draw, tokens))


def draw(tokens: int) -> dict[str, float]:
    """Processor time until the first batch, and of one of those that follow it, in order."""
    began = time.process_time()
    samples = PretrainingSamples(cast(TokenStream, SimulatedStream(tokens)), _SEQ_LEN, seed=1)
    samples.batch(np.arange(_ROWS))
    opened = time.process_time()
    for batch in range(1, 1 + _BATCHES):
        samples.batch(np.arange(_ROWS) + batch * _ROWS)
    ended = time.process_time()
    return {"seconds to start": opened - began, "seconds a batch": (ended - opened) / _BATCHES}


# -- the number of ranks ---------------------------------------------------------------------------


def ranks(threads: int | None) -> Iterator[Point]:
    """A step of a fixed batch under ZeRO-2 on 1 to 4 processes: processor time of all of them."""
    config = _gpt(256)
    for count in (1, 2, 4):
        step = (config, _ROWS, 2)
        work = Candidate(f"{count}", engine_step, step, processes=count, threads=1)
        needs = count * estimate_memory(_run(config, count, 2, zero=2), count, "fp32").total
        yield Point(count, {"seconds a step": 1.0}, work, needs=needs)


def planned_ranks(threads: int | None) -> Iterator[Point]:
    """The plan of 1 to 4,096 data-parallel ranks under ZeRO-2."""
    plan(1)  # imports what a plan needs
    for count in (1, 4, 16, 64, 256, 1024, 4096):
        expected = {"optimizer bytes a rank": 1 / count, "seconds to plan": 1.0}
        yield Point(count, expected, measured=functools.partial(plan, count))


def plan(count: int) -> dict[str, float]:
    """What a rank holds of the optimizer, and the processor time of finding that out."""
    config = _run(_gpt(512), ranks=count, zero=2)
    began = time.process_time()
    memory = estimate_memory(config, count, "fp32")
    seconds = time.process_time() - began
    return {"optimizer bytes a rank": memory.optimizer, "seconds to plan": seconds}


# -- the length of EGPT's history ------------------------------------------------------------------


def histories(threads: int | None) -> Iterator[Point]:
    """A training window of EGPT with 1 to 1,000 chunks, its encoder's states given."""
    for chunks in (1, 4, 16, 64, 250, 1000):
        config = ModelConfig(
            kind="egpt",
            vocab_size=VOCAB,
            max_seq_len=_CHUNK,
            hidden_size=128,
            num_layers=2,
            num_heads=2,
            egpt=EGPTConfig(num_chunks=chunks, chunk_size=_CHUNK),
        )
        needs = _pass_bytes(config)
        operations = meta_model(config).flops_per_token() * config.sample_len
        yield Point(
            chunks,
            {"seconds a step": operations, "bytes": needs},
            Candidate(f"{chunks:,} chunks", window_step, (config,), threads=threads),
            needs=needs,
        )


def window_step(config: ModelConfig) -> Workload:
    """Loss and gradients of one window."""
    model = build_model(config, single_grid())

    def encode(tokens: Tensor, before: Tensor | None = None) -> Tensor:
        return torch.zeros(*tokens.shape, config.hidden_size, device=tokens.device)

    inputs = build_inputs(config, encode)
    shape = (1, config.egpt.num_chunks, config.egpt.chunk_size)
    tokens = torch.randint(VOCAB, shape, device=model.grid.device)

    def one() -> None:
        (inputs.loss(model, {"tokens": tokens, "targets": tokens}) / tokens.numel()).backward()
        model.zero_grad(set_to_none=True)

    with TensorMeter() as meter:
        one()
    info: dict[str, Any] = {"bytes": meter.peak}
    return Workload(one, tokens.numel(), info)


CURVES: dict[str, tuple[str, Points]] = {
    "model": ("parameters", model_sizes),
    "context": ("tokens of context", contexts),
    "corpus": ("tokens of the corpus", corpora),
    "ranks": ("processes", ranks),
    "planned": ("ranks, planned", planned_ranks),
    "history": ("chunks of history", histories),
}
"""Each with the name of what grows along it."""
