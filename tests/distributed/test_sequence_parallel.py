"""Sequence parallelism changes where tokens are, and no number: fp64 equality with one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.model.adapters import add_adapters, initialize_adapters
from megaegpt.model.build import Model, build_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import shard, spec_of, unshard
from megaegpt.planning.allocations import TensorMeter
from megaegpt.training.checkpoint.manager import CheckpointManager
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import advance, make_engine, run_config
from tests.tiny.models import ATTENTION, BASE, of_kind, tokens_of, variant

SMALL = replace(BASE, max_seq_len=16, num_layers=2)
EXTENDED = {"local_attention": True, "memory_gate": True}
RESIDUAL = {"adapter_residual": True, "attention_sink": True}
MEMORY = {"token_memory": True, "memory_dim": 8, "memory_pointers": 2}
ROWS, LENGTH = 3, 11  # of no tensor-parallel size a multiple
MODELS: dict[str, ModelConfig] = {
    **{name: variant(name, "rotary", SMALL) for name in ATTENTION},
    "gpt2": replace(SMALL, tied_embeddings=False, z_loss=1e-4),
    "documents": replace(SMALL, document_end=3, num_kv_heads=2),
    "egpt": of_kind(SMALL, "egpt"),
    "egpt_extended": of_kind(variant("latent", "rotary", SMALL), "egpt", **EXTENDED, **RESIDUAL),
    "egpt_memory": of_kind(SMALL, "egpt", local_attention=True, **RESIDUAL, **MEMORY),
    "deepgpt": of_kind(variant("qwen3", "rotary", SMALL), "deepgpt"),
}
SOME = ["multi_query", "latent_with_query_latent", "olmo2", "documents", "egpt_memory", "deepgpt"]


def model_of(config: ModelConfig, grid: ProcessGrid, sequence: bool) -> Model:
    """In fp64, with weights far from 0."""
    config = replace(config, init_std=0.15, tied_embeddings=config.kind == "gpt")
    model = build_model(config, grid, seed=3, sequence_parallel=sequence).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = spec_of(parameter)
            if len(spec.full_shape) == 1:
                steps = torch.arange(spec.full_shape[0], dtype=torch.float64)
                parameter.add_(shard(0.1 * torch.sin(steps + len(name)), spec, grid))
    return model


def batch_of(config: ModelConfig, grid: ProcessGrid, sequence: bool) -> dict[str, Tensor]:
    """States and features are those of a GPT that is cut in the same way."""
    tokens, targets = (tokens_of(config, ROWS, LENGTH, seed) for seed in (0, 1))
    if config.kind == "gpt":
        targets[0, :4] = -100
        return {"tokens": tokens, "targets": targets}
    egpt = config.egpt
    shape = ROWS, egpt.num_chunks, egpt.chunk_size
    tokens, targets = (
        tokens_of(config, ROWS, egpt.num_chunks * egpt.chunk_size, s) for s in (0, 1)
    )
    gpt = model_of(replace(BASE, num_layers=1), grid, sequence)
    assert isinstance(gpt, GPT)
    states = FrozenEncoder(gpt)(tokens.view(shape))
    batch = {"token_states": states, "targets": targets.view(shape)}
    if config.kind == "deepgpt":
        return batch
    batch["features"] = states[:, :-1, -1]
    text = torch.cat([tokens[:, :1], tokens % 9], dim=1)  # some come again
    return {**batch, "text": text} if egpt.token_memory else batch


def passed(
    config: ModelConfig, grid: ProcessGrid, sequence: bool, recompute: str = "none"
) -> dict[str, Tensor]:
    """The loss, every gradient, and the losses of an evaluation of other lengths."""
    model = model_of(config, grid, sequence)
    model.stack.recompute = recompute
    batch = batch_of(config, grid, sequence)
    torch.manual_seed(5)
    loss = model(**batch)
    loss.backward()
    with torch.no_grad():
        nats = model.eval()(**{name: x[:1] for name, x in batch.items()}, reduction="none")
    found = {name: unshard(p.grad, spec_of(p), grid) for name, p in model.named_parameters()}
    norm = torch.stack([grad.square().sum() for grad in found.values()]).sum().sqrt()
    return {"loss": loss.detach(), "norm": norm, "evaluated": nats, **found}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest number of each tensor; of a gradient to that of all gradients."""
    largest = {name: x.abs().max() for name, x in expected.items()}
    scale = max(x for name, x in largest.items() if "." in name)
    return max(
        ((x - expected[name]).abs().max() / (scale if "." in name else largest[name])).item()
        for name, x in found.items()
    )


def differences(names: list[str], tp: int) -> dict[str, float]:
    """Of each model cut over ranks and over tokens, from the whole one."""
    found = {}
    for name in names:
        alone = passed(MODELS[name], ProcessGrid(), False)
        found[name] = largest_difference(passed(MODELS[name], grid_for(tp), True), alone)
    return found


def assert_same_as_on_one_rank(distributed: Distributed, names: list[str], tp: int) -> None:
    for found in distributed(tp, differences, names, tp):
        assert list(found) == names
        assert max(found.values()) <= 1e-9, found


def test_models_are_the_same_as_on_one_rank(distributed: Distributed) -> None:
    assert_same_as_on_one_rank(distributed, SOME, 2)


@pytest.mark.long
@pytest.mark.parametrize("tp", [2, 4])
def test_every_model_is_the_same_as_on_one_rank(distributed: Distributed, tp: int) -> None:
    assert_same_as_on_one_rank(distributed, list(MODELS), tp)


def dropped(names: list[str]) -> float:
    """With dropout and recomputation: from the same ranks without sequence parallelism."""
    largest = 0.0
    for name in names:
        config = replace(MODELS[name], dropout=0.3)
        expected = passed(config, grid_for(2), False)
        for recompute in ("none", "selective", "full"):
            found = passed(config, grid_for(2), True, recompute)
            largest = max(largest, largest_difference(found, expected))
    return largest


@pytest.mark.parametrize(
    "names",
    [["olmo2"], pytest.param(["gpt2", "egpt_extended", "deepgpt"], marks=pytest.mark.long)],
)
def test_a_token_is_dropped_alike_wherever_it_is(
    distributed: Distributed, names: list[str]
) -> None:
    assert max(distributed(2, dropped, names)) <= 1e-9


def adapted(name: str, dropout: float) -> float:
    """Gradients of adapters, from the same ranks without sequence parallelism."""
    results = []
    for sequence in (False, True):
        grid, config = grid_for(2), MODELS[name]
        model = model_of(config, grid, sequence)
        add_adapters(model, LoRAConfig(rank=2, dropout=dropout, targets=("attention", "mlp")))
        initialize_adapters(model, 7, grid)
        with torch.no_grad():
            for parameter in model.parameters():  # the second factors are zero at first
                if parameter.requires_grad:
                    parameter.add_(0.1)
        torch.manual_seed(5)
        loss = model(**batch_of(config, grid, sequence))
        loss.backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"loss": loss.detach(), **trained})
    return largest_difference(results[1], results[0])


@pytest.mark.parametrize(
    "name", ["latent_with_query_latent", pytest.param("multi_query", marks=pytest.mark.long)]
)
def test_adapters_learn_the_same(distributed: Distributed, name: str) -> None:
    assert max(distributed(2, adapted, name, 0.2)) <= 1e-9


def resumed_elsewhere(folder: Path) -> dict[str, list[float]]:
    """Losses and norms of steps 2 and 3 with and without sequence parallelism, from a checkpoint of
    each.
    """
    curves = {}
    for saved_with in (False, True):
        for sequence in (saved_with, not saved_with):
            parallel = {"tensor_parallel_size": 2, "sequence_parallel": sequence}
            config = run_config(parallel=parallel, training={"global_batch_size": 2})
            engine = make_engine(config, grid_for(2))
            manager = CheckpointManager(folder / str(saved_with), keep=1)
            if sequence == saved_with:
                advance(engine, config, range(2))
                manager.save(engine, 2, {})
            else:
                manager.load(engine)
            curve = advance(engine, config, range(2, 4))
            engine.assert_replicas_equal()
            engine.close()
            curves[f"{saved_with}, then {sequence}"] = curve.losses + curve.norms
    return curves


@pytest.mark.long
def test_a_checkpoint_goes_on_with_it_and_without(tmp_path: Path, distributed: Distributed) -> None:
    curves = distributed(2, resumed_elsewhere, tmp_path)[0]
    expected = curves.pop("False, then False")
    for how, curve in curves.items():
        assert curve == pytest.approx(expected, rel=1e-5), how


# -- memory


def activations(layers: int, recompute: str, sequence: bool) -> tuple[int, int]:
    """Bytes that are kept between forward and backward, and the most that ever are."""
    config = replace(SMALL, max_seq_len=64, num_layers=layers)
    tokens = tokens_of(config, 4, 64)
    with TensorMeter() as meter:
        model = build_model(
            config,
            grid_for(2),
            activation_checkpointing=recompute,  # type: ignore[arg-type]
            sequence_parallel=sequence,
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = meter.live
        meter.reset_peak()
        loss = model(tokens, tokens)
        kept = meter.live - before
        loss.backward()
    return kept, meter.peak - before


def shares(layers: int, recompute: str) -> list[float]:
    """Of those bytes, what is left by sequence parallelism over two ranks."""
    without, with_it = (activations(layers, recompute, sequence) for sequence in (False, True))
    return [after / before for after, before in zip(with_it, without, strict=True)]


@pytest.mark.parametrize(
    ("layers", "recompute", "most"),
    [
        (16, "full", 0.56),
        (8, "selective", 0.72),
        pytest.param(8, "none", 0.85, marks=pytest.mark.long),
    ],
)
def test_a_rank_of_two_keeps_less_for_the_backward_pass(
    distributed: Distributed, layers: int, recompute: str, most: float
) -> None:
    """Half of what lies between the layers that are cut anyway; of a block that is recomputed
    nothing else is kept.
    """
    for kept, _ in distributed(2, shares, layers, recompute):
        assert kept <= most


@pytest.mark.long
def test_a_deep_models_peak_is_nearly_half(distributed: Distributed) -> None:
    for _, peak in distributed(2, shares, 80, "full"):
        assert peak <= 0.6


# -- compiled blocks


def compiled_difference(name: str) -> float:
    """Of blocks that are one graph each, from the same ones not compiled, at several widths."""
    torch.compiler.reset()  # which forgets what other tests have compiled on this worker
    config = replace(MODELS[name], num_layers=1)
    kept, compiled = (model_of(config, grid_for(2), True) for _ in range(2))
    for block in compiled.stack.blocks:
        block.compile(backend="eager", fullgraph=True)
    for width in (LENGTH, 6, 7):
        batch = {n: x[:, :width] for n, x in batch_of(config, grid_for(2), True).items()}
        for model in (kept, compiled):
            model(**batch).backward()
    pairs = zip(kept.parameters(), compiled.parameters(), strict=True)
    return max((a.grad - b.grad).abs().max().item() for a, b in pairs)


@pytest.mark.long
@pytest.mark.parametrize("name", ["multi_query", "latent"])
def test_a_compiled_block_is_one_graph(distributed: Distributed, name: str) -> None:
    assert distributed(2, compiled_difference, name) == [0.0, 0.0]
