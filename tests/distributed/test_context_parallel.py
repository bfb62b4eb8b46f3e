"""Context parallelism changes where tokens are, and no number: fp64 equality with one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.config.run import RunConfig
from megaegpt.model.adapters import add_adapters, initialize_adapters
from megaegpt.model.build import Model, build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import shard, spec_of, unshard
from megaegpt.planning.allocations import TensorMeter
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import Curve, run_config, train, train_plainly
from tests.tiny.engines import largest_difference as largest_difference_of_curves
from tests.tiny.models import ATTENTION, BASE, tokens_of, variant

SMALL = replace(BASE, max_seq_len=24, num_layers=2)
ROWS, LENGTH = 4, 21  # tokens that are no multiple of the pieces of any group
Topology = tuple[int, int]
"""Tensor- and context-parallel size; what is left of the ranks is data parallel."""
SIX_HEADS = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 8}
"""Which neither two nor four ranks can have: one more key head would have to be read by both."""
MODELS: dict[str, ModelConfig] = {
    **{name: variant(name, "rotary", SMALL) for name in ATTENTION if name != "qwen2"},
    "gpt2": replace(SMALL, tied_embeddings=False, z_loss=1e-4),
    "extended": variant("latent", "rotary_extended", SMALL),
    "documents": replace(SMALL, document_end=3),
    "documents_in_windows": replace(variant("qwen3", "rotary", SMALL), document_end=3),
    "gathered": replace(variant("grouped", "rotary", SMALL), **SIX_HEADS),
    "gathered_documents_in_windows": replace(
        variant("qwen3", "rotary", SMALL), **SIX_HEADS, document_end=3
    ),
    "latent_of_3_heads": replace(variant("latent", "rotary", SMALL), num_heads=3, head_dim=10),
}
TOPOLOGIES = [(1, 4), (2, 2), (1, 2)]
"""Of four ranks."""
SOME = [
    ("gpt2", (1, 4)),
    ("gathered", (1, 2)),
    ("latent", (2, 2)),
    ("latent_of_3_heads", (1, 2)),
    ("documents", (1, 2)),
    ("gathered_documents_in_windows", (1, 4)),
]


def model_of(
    config: ModelConfig, grid: ProcessGrid, sequence: bool, recompute: str, adapted: bool = False
) -> Model:
    """In fp64, with weights far from 0; by the operators of fused blocks, if it can be, where ranks
    share tokens.
    """
    model = build_model(replace(config, init_std=0.15), grid, seed=3, sequence_parallel=sequence)
    if adapted:
        add_adapters(model, LoRAConfig(rank=2, targets=("attention", "mlp")))
        initialize_adapters(model, 7, grid)
    model.stack.recompute = recompute
    model.stack.fused = grid.cp_group is not None
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = spec_of(parameter)
            if adapted and parameter.requires_grad:  # the second factors are zero at first
                parameter.add_(0.1)
            if len(spec.full_shape) == 1:
                steps = torch.arange(spec.full_shape[0], dtype=torch.float64)
                parameter.add_(shard(0.1 * torch.sin(steps + len(name)), spec, grid))
    return model


def batch_of(config: ModelConfig, grid: ProcessGrid, step: int) -> dict[str, Tensor]:
    """The rows of this rank's group, of which some tokens are not predicted."""
    tokens, targets = (tokens_of(config, ROWS, LENGTH, 2 * step + n) for n in (0, 1))
    targets[0, :14] = -100
    rows = slice(grid.dp_rank, None, grid.dp_size)
    return {"tokens": tokens[rows], "targets": targets[rows]}


def summed(tensors: list[Tensor], grid: ProcessGrid) -> list[Tensor]:
    """Over the replicas of the weights."""
    flat = torch.cat([x.flatten() for x in tensors])
    if grid.replica_group is not None:
        dist.all_reduce(flat, group=grid.replica_group)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


def trained(
    config: ModelConfig,
    grid: ProcessGrid,
    sequence: bool = False,
    recompute: str = "none",
    *,
    steps: int,
    adapted: bool = False,
) -> dict[str, Tensor]:
    """Losses and norms of steps of AdamW, the first step's gradients, and the losses of an
    evaluation at the end.
    """
    model, found = model_of(config, grid, sequence, recompute, adapted), {}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-4, foreach=False)
    losses, norms = [], []
    for step in range(steps):
        loss = model(**batch_of(config, grid, step))
        loss.backward()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        parameters = [parameter for _, parameter in named]
        loss, *gradients = summed([loss.detach(), *(p.grad for p in parameters)], grid)
        square = torch.zeros(1, dtype=torch.float64)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
            if grid.tp_rank == 0 or spec_of(parameter).tp_dim is not None:
                square += gradient.square().sum()
        if grid.tp_group is not None:
            dist.all_reduce(square, group=grid.tp_group)
        losses.append(loss)
        norms.append(square.sqrt())
        if not found:
            found = {f"of.{n}": unshard(p.grad, spec_of(p), grid).clone() for n, p in named}
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        whole = batch_of(config, ProcessGrid(), 0)
        nats = model.eval()(**whole, reduction="none")
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "evaluated": nats, **found}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest number of each tensor; of a gradient to that of all gradients."""
    largest = {name: x.abs().max() for name, x in expected.items()}
    scale = max(x for name, x in largest.items() if "." in name)
    return max(
        ((x - expected[name]).abs().max() / (scale if "." in name else largest[name])).item()
        for name, x in found.items()
    )


def differences(cases: list[tuple[str, Topology]], steps: int) -> list[float]:
    """Of each model under each topology from the whole one; with tensor parallelism, tokens are cut
    over its ranks too, and with two context-parallel ranks blocks are recomputed.
    """
    alone = {name: trained(MODELS[name], ProcessGrid(), steps=steps) for name, _ in cases}
    found = []
    for name, (tp, cp) in cases:
        recompute = "none" if cp > 2 else "full" if tp == 1 else "selective"
        cut = trained(MODELS[name], grid_for(tp, cp), tp > 1, recompute, steps=steps)
        found.append(largest_difference(cut, alone[name]))
    return found


def assert_same_as_on_one_rank(
    distributed: Distributed, ranks: int, cases: list[tuple[str, Topology]], steps: int
) -> None:
    for found in distributed(ranks, differences, cases, steps):
        assert max(found) <= 1e-9, [c for c, d in zip(cases, found, strict=True) if d > 1e-9]


def test_models_are_the_same_as_on_one_rank(distributed: Distributed) -> None:
    assert_same_as_on_one_rank(distributed, 4, SOME, steps=2)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "topologies"), [(2, [(1, 2)]), (4, TOPOLOGIES)])
def test_every_model_is_the_same_as_on_one_rank_for_10_steps(
    distributed: Distributed, ranks: int, topologies: list[Topology]
) -> None:
    cases = [
        (name, (tp, cp))
        for name, config in MODELS.items()
        for tp, cp in topologies
        if config.num_heads % tp == 0 and (config.kv_heads % tp == 0 or config.kv_heads == 1)
    ]
    assert_same_as_on_one_rank(distributed, ranks, cases, steps=10)


def adapted_difference() -> float:
    results = [
        trained(MODELS["grouped"], grid, sequence, steps=2, adapted=True)
        for grid, sequence in ((ProcessGrid(), False), (grid_for(2, 2), True))
    ]
    return largest_difference(results[1], results[0])


@pytest.mark.long
def test_adapters_learn_the_same(distributed: Distributed) -> None:
    assert max(distributed(4, adapted_difference)) <= 1e-9


# -- with DeepSpeed


def train_all(configs: list[RunConfig]) -> list[Curve]:
    return [
        train(config, grid_for(parallel.tensor_parallel_size, parallel.context_parallel_size), 5)
        for config in configs
        for parallel in (config.parallel,)
    ]


def engine_config(zero_stage: int, tp: int = 1, **training: object) -> RunConfig:
    """Of several micro-steps."""
    parallel = {"context_parallel_size": 2, "tensor_parallel_size": tp, "zero_stage": zero_stage}
    return run_config(parallel=parallel, training={"steps": 5, **training})


def test_zero_takes_the_steps_of_plain_adamw(distributed: Distributed) -> None:
    """Accumulated gradients of ranks that have unequal numbers of targets."""
    plain = train_plainly(run_config(training={"steps": 5}))
    configs = [engine_config(0), engine_config(2, activation_checkpointing="full")]
    for curves in distributed(2, train_all, configs):
        for curve in curves:
            assert largest_difference_of_curves(curve, plain) <= 1e-5


@pytest.mark.long
def test_every_zero_stage_and_precision_takes_the_steps_of_plain_adamw(
    distributed: Distributed,
) -> None:
    plain = train_plainly(run_config(training={"steps": 5}))
    configs = [engine_config(1, activation_checkpointing="selective"), engine_config(2)]
    configs += [engine_config(3, activation_checkpointing="full")]
    for curves in distributed(2, train_all, configs):
        for curve in curves:
            assert largest_difference_of_curves(curve, plain) <= 1e-5
    half = [engine_config(stage, precision="bf16") for stage in (1, 2)]
    for curves in distributed(2, train_all, half):
        for curve in curves:
            assert curve.losses == pytest.approx(plain.losses, rel=2**-9)


@pytest.mark.long
def test_data_and_tensor_parallel_groups_take_the_steps_of_plain_adamw(
    distributed: Distributed,
) -> None:
    plain = train_plainly(run_config(training={"steps": 5}))
    configs = [engine_config(stage, tp) for stage, tp in ((0, 1), (2, 1), (0, 2), (1, 2), (2, 2))]
    for curves in distributed(4, train_all, configs):
        for curve in curves:
            assert largest_difference_of_curves(curve, plain) <= 1e-5


# -- dropout


def dropped(recompute: str) -> dict[str, Tensor]:
    config = replace(MODELS["grouped"], dropout=0.3)
    torch.manual_seed(5)
    return trained(config, grid_for(1, 2), recompute=recompute, steps=2)


def test_recomputed_blocks_drop_what_they_dropped(distributed: Distributed) -> None:
    """Each rank by a stream of its own, from which the common one is not moved away."""
    for found, expected in zip(
        distributed(2, dropped, "full"), distributed(2, dropped, "none"), strict=True
    ):
        assert largest_difference(found, expected) <= 1e-12


# -- memory


def activations(grid: ProcessGrid, length: int, heads: int) -> tuple[int, int]:
    """Bytes that are kept between forward and backward, and the most that ever are."""
    config = replace(SMALL, max_seq_len=length, num_heads=heads)
    tokens = tokens_of(config, 1, length)
    with TensorMeter() as meter:
        model = build_model(config, grid)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = meter.live
        meter.reset_peak()
        loss = model(tokens, tokens)
        kept = meter.live - before
        loss.backward()
    return kept, meter.peak - before


def shares(length: int, heads: int) -> list[float]:
    """Of those bytes, what is left on each of two ranks."""
    whole, cut = (activations(grid, length, heads) for grid in (ProcessGrid(), grid_for(1, 2)))
    return [after / before for after, before in zip(cut, whole, strict=True)]


@pytest.mark.parametrize("length", [2048, pytest.param(8192, marks=pytest.mark.long)])
def test_a_rank_of_two_keeps_and_needs_little_more_than_half(
    distributed: Distributed, length: int
) -> None:
    for kept, peak in distributed(2, shares, length, 4):
        assert kept <= 0.55
        assert peak <= 0.6


# -- compiled blocks


def compiled_difference(name: str) -> float:
    """Of blocks that are one graph each, from the same ones not compiled, at several widths."""
    torch.compiler.reset()  # which forgets what other tests have compiled on this worker
    config, grid = replace(MODELS[name], num_layers=1), grid_for(1, 2)
    kept, compiled = (model_of(config, grid, False, "none") for _ in range(2))
    for block in compiled.stack.blocks:
        block.compile(backend="eager", fullgraph=True)
    for width in (LENGTH, 8):
        batch = {n: x[:, :width] for n, x in batch_of(config, grid, 0).items()}
        for model in (kept, compiled):
            model(**batch).backward()
    pairs = zip(kept.parameters(), compiled.parameters(), strict=True)
    return max((a.grad - b.grad).abs().max().item() for a, b in pairs)


@pytest.mark.long
@pytest.mark.parametrize("name", ["multi_query", "gathered_documents_in_windows"])
def test_a_compiled_block_is_one_graph(distributed: Distributed, name: str) -> None:
    assert distributed(2, compiled_difference, name) == [0.0, 0.0]
