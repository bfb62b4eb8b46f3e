"""Chunk parallelism changes where chunks are, and no number: fp64 equality with one rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig
from megaegpt.labels import IGNORE, NOTHING_BEFORE
from megaegpt.model.build import Model, build_inputs, build_model
from megaegpt.model.egpt import copy_attention
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.chunks import ChunkShares
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of, unshard
from megaegpt.planning.allocations import TensorMeter
from tests.distributed.harness import Distributed, grid_for
from tests.model.test_adapters import with_adapters
from tests.tiny.models import BASE, tokens_of, variant

CHUNKS, CHUNK, ROWS, STEPS = 8, 4, 4, 10
SMALL = replace(BASE, hidden_size=16, num_layers=1, num_heads=2, init_std=0.15)
GPT = replace(SMALL, max_seq_len=CHUNK + 3, document_end=5)  # texts end inside chunks
MEMORY = {"token_memory": True, "memory_dim": 4, "memory_pointers": 2}
EXTENDED = {"local_attention": True, "attention_sink": True}


def egpt(base: ModelConfig = SMALL, overlap: int = 0, kind: str = "egpt", **changes) -> ModelConfig:
    chunks = EGPTConfig(num_chunks=CHUNKS, chunk_size=CHUNK, **changes)
    return replace(base, kind=kind, egpt=chunks, encoder=EncoderConfig(overlap=overlap))


MODELS = {
    "original": egpt(),
    "memory": egpt(overlap=3, **EXTENDED, **MEMORY),
    "some_chunks": egpt(overlap=3, memory_chunks=2, **MEMORY),
    "residual": egpt(
        variant("latent", "rotary", SMALL),
        adapter_residual=True,
        memory_gate=True,
    ),
    "window": egpt(variant("window", "rotary", SMALL), **EXTENDED),
    "no_history": egpt(history=False, local_attention=True),
    "deepgpt": egpt(overlap=3, kind="deepgpt"),
}


@dataclass(frozen=True)
class Case:
    """A model on ranks."""

    model: str
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    micro_steps: int = 1
    chunks: int = CHUNKS
    """Of the windows: fewer than the model takes where fine-tuning has cut what is padding."""


@dataclass
class Steps:
    """What training gives, whole, in numbers that travel between processes."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the last step."""


def batch_of(case: Case, step: int) -> dict[str, Tensor]:
    """Windows of which all rows together have unequal numbers of targets by chunk."""
    model, length = MODELS[case.model], case.chunks * CHUNK
    tokens, targets = (tokens_of(model, ROWS, length, 2 * step + i) % 9 for i in (0, 1))
    targets[0, : CHUNK + 1] = IGNORE
    before = tokens_of(model, ROWS, 3, 100 + step)
    before[1] = NOTHING_BEFORE
    return {"tokens": tokens, "targets": targets, "before": before}


def train(case: Case, grid: ProcessGrid) -> Steps:
    """In fp64, by AdamW, on gradients that are summed over everything a step has."""
    config = MODELS[case.model]
    model: Model = build_model(
        config,
        grid,
        seed=3,
        activation_checkpointing=case.recompute,  # type: ignore[arg-type]
        sequence_parallel=case.sequence_parallel,
    ).double()
    encoder = FrozenEncoder(build_model(GPT, grid, seed=4).double())  # type: ignore[arg-type]
    shares = ChunkShares(grid) if grid.cp_size > 1 else None
    inputs = build_inputs(config, encoder, torch.float64, shares=shares)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = Steps()
    for step in range(STEPS):
        optimizer.zero_grad()
        whole, total = batch_of(case, step), torch.zeros((), dtype=torch.float64)
        torch.manual_seed(step)
        parts = torch.arange(ROWS).chunk(case.micro_steps * grid.dp_size)
        for rows in parts[grid.dp_rank :: grid.dp_size]:
            batch = inputs.prepare({name: x[rows] for name, x in whole.items()})
            loss = inputs.loss(model, batch)
            loss.backward()
            total += loss.detach()
        if grid.replica_group is not None:
            dist.all_reduce(total, group=grid.replica_group)
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=grid.replica_group)
        optimizer.step()
        found.gradients = {
            name: unshard(p.grad, spec_of(p), grid) for name, p in model.named_parameters()
        }
        found.losses.append(total.item())
        squares = [grad.square().sum() for grad in found.gradients.values()]
        found.norms.append(torch.stack(squares).sum().sqrt().item())
    return found


def train_all(cases: list[Case]) -> list[Steps]:
    return [train(case, grid_for(case.tp, case.cp)) for case in cases]


def assert_same_as_on_one_rank(distributed: Distributed, ranks: int, cases: list[Case]) -> None:
    """Losses and norms of all steps, and the gradients of the last one, on every rank."""
    by_rank = distributed(ranks, train_all, cases)
    for number, case in enumerate(cases):
        alone = train(Case(case.model, chunks=case.chunks), ProcessGrid())
        scale = max(grad.abs().max() for grad in alone.gradients.values())
        for results in by_rank:
            found = results[number]
            assert found.losses == pytest.approx(alone.losses, rel=1e-9), case
            assert found.norms == pytest.approx(alone.norms, rel=1e-9), case
            assert found.gradients.keys() == alone.gradients.keys()
            for name, grad in found.gradients.items():
                assert (grad - alone.gradients[name]).abs().max() <= 1e-9 * scale, (case, name)


def test_ten_steps_of_egpt_are_those_of_one_rank(distributed: Distributed) -> None:
    cases = [
        Case("original", cp=4),
        Case("memory", tp=2, cp=2, sequence_parallel=True, recompute="full"),
        Case("some_chunks", cp=4),
    ]
    assert_same_as_on_one_rank(distributed, 4, cases)


@pytest.mark.long
def test_ten_steps_of_every_form_are_those_of_one_rank(distributed: Distributed) -> None:
    cases = []
    for model in MODELS:
        cases += [
            Case(model, cp=4, recompute="full"),
            Case(model, tp=2, cp=2, sequence_parallel=True, recompute="selective"),
        ]
        cases += [Case(model, cp=2, micro_steps=2), Case(model, cp=4, chunks=5)]
    assert_same_as_on_one_rank(distributed, 4, cases)
    assert_same_as_on_one_rank(distributed, 2, [Case(model, cp=2) for model in MODELS])


def compiled_difference(name: str) -> float:
    """Of gradients through blocks that are one graph each, from those through plain ones."""
    torch.compiler.reset()  # which forgets what other tests have compiled on this worker
    grid, found = grid_for(1, 2), []
    encoder = FrozenEncoder(build_model(GPT, grid, seed=4).double())  # type: ignore[arg-type]
    inputs = build_inputs(MODELS[name], encoder, torch.float64, shares=ChunkShares(grid))
    for compiled in (False, True):
        model = build_model(MODELS[name], grid, seed=3).double()
        for block in model.stack.blocks:
            if compiled:
                block.compile(backend="eager", fullgraph=True)
        torch.manual_seed(0)
        inputs.loss(model, inputs.prepare(batch_of(Case(name), 0))).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("name", ["original", "memory"])
def test_a_compiled_block_is_one_graph(distributed: Distributed, name: str) -> None:
    assert distributed(2, compiled_difference, name) == [0.0, 0.0]


def dropped(kind: str, in_adapters: bool) -> tuple[float, float]:
    """The loss of chunks that are alike on all ranks, and the next number of the common stream."""
    config = replace(egpt(kind=kind, history=False), positions="none")
    grid = grid_for(1, 2)
    if in_adapters:
        model = with_adapters(config, grid, torch.float32, dropout=0.5).train()
    else:
        model = build_model(replace(config, dropout=0.5), grid, seed=3)
    states = torch.linspace(-1, 1, config.hidden_size).expand(1, 2, CHUNK, -1)
    shares = {"shares": ChunkShares(grid), "features": states[:, :0, -1]} if kind == "egpt" else {}
    torch.manual_seed(1)
    loss = model(states, targets=torch.ones(1, 2, CHUNK, dtype=torch.long), **shares)  # type: ignore[arg-type]
    return loss.item(), torch.rand(()).item()


@pytest.mark.parametrize("in_adapters", [False, True])
@pytest.mark.parametrize("kind", ["egpt", "deepgpt"])
def test_ranks_drop_other_numbers_of_their_chunks(
    distributed: Distributed, kind: str, in_adapters: bool
) -> None:
    (loss, next_number), (loss_there, next_number_there) = distributed(
        2, dropped, kind, in_adapters
    )
    assert loss != loss_there
    assert next_number == next_number_there


# -- memory and operations

LONG = 64  # tokens of a chunk


def work(form: str, chunks: int, cp: int) -> tuple[int, int]:
    """The most bytes that a micro-step ever holds beside weights and gradients, and its operations
    in products.
    """
    grid, small = grid_for(1, cp), MODELS[form]
    config = replace(
        small,
        hidden_size=64,
        num_layers=4,
        egpt=replace(small.egpt, num_chunks=chunks, chunk_size=LONG),
    )
    gpt = replace(GPT, hidden_size=64, max_seq_len=LONG + config.encoder.overlap)
    encoder = FrozenEncoder(build_model(gpt, ProcessGrid()))  # type: ignore[arg-type]
    shares = ChunkShares(grid) if cp > 1 else None
    inputs = build_inputs(config, encoder, shares=shares)
    with TensorMeter() as meter:
        model = build_model(config, ProcessGrid())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tokens = tokens_of(config, 1, chunks * LONG)
        batch = inputs.prepare({"tokens": tokens, "targets": tokens})
        before = meter.live
        meter.reset_peak()
        with FlopCounterMode(display=False) as counter:
            inputs.loss(model, batch).backward()
    return meter.peak - before, counter.get_total_flops()


def measure_growth(form: str) -> tuple[tuple[int, int], tuple[int, int]]:
    scores = copy_attention.SCORES_AT_ONCE
    before = scores["cpu"]
    scores["cpu"] = 1 << 13  # as of windows that are far longer than those of this test
    try:
        return work(form, 4, 1), work(form, 16, 4)
    finally:
        scores["cpu"] = before


@pytest.mark.parametrize(
    ("form", "bytes_", "operations"), [("original", 1.08, 1.08), ("memory", 1.08, 1.08)]
)
def test_four_ranks_train_on_four_times_the_window_of_one(
    distributed: Distributed, form: str, bytes_: float, operations: float
) -> None:
    """Every rank holds what is gathered, features and keys with their gradients, and runs the
    features through the decoder; and there are more keys to be compared with.
    """
    done = []
    for alone, shared in distributed(4, measure_growth, form):
        assert shared[0] <= bytes_ * alone[0]
        assert shared[1] <= operations * alone[1]
        done.append(shared[1])
    assert max(done) <= 1.001 * min(done)  # though late chunks see more than early ones
