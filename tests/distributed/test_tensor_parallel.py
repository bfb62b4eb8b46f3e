"""TP 1, 2 and 4 give the same logits, losses, gradients, gradient norms, training runs and text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.interop.foreign_models import import_model
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import Model, build_model, empty_model
from megaegpt.model.weights import load_weights, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of, unshard
from megaegpt.parallel.together import all_gather_object
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.families import random_model, sequences
from tests.tiny.models import ATTENTION, POSITIONS, variant

GPT = ModelConfig(vocab_size=300, max_seq_len=12, hidden_size=32, num_layers=2, num_heads=4)
EGPT = replace(GPT, kind="egpt", bias=False, egpt=EGPTConfig(num_chunks=3, chunk_size=4))
IMPROVED = replace(
    EGPT,
    egpt=replace(
        EGPT.egpt,
        local_attention=True,
        memory_gate=True,
        adapter_residual=True,
    ),
)
MODELS = {
    "gpt": GPT,
    "gpt_untied": replace(GPT, tied_embeddings=False),
    "egpt": EGPT,
    "egpt_improved": IMPROVED,
    "egpt_improved_llama": replace(
        variant("qwen3", "rotary_extended", GPT), kind="egpt", egpt=IMPROVED.egpt
    ),
    "egpt_memory": replace(
        EGPT,
        egpt=replace(EGPT.egpt, token_memory=True, memory_dim=8, memory_pointers=2),
    ),
    "deepgpt": replace(EGPT, kind="deepgpt"),
}
STEPS, VARIANT_STEPS = 20, 10


def _batch(config: ModelConfig, step: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    if config.kind == "gpt":
        tokens = torch.randint(config.vocab_size, (2, 13), generator=generator)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].clone()}
    egpt = config.egpt
    shape = (2, egpt.num_chunks, egpt.chunk_size)
    states = torch.randn(*shape, 32, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(config.vocab_size, shape, generator=generator)
    targets[0, 0, :2] = -100
    batch = {"token_states": states, "targets": targets}
    if config.kind == "deepgpt":
        return batch
    features = torch.randn(2, 2, 32, generator=generator)
    batch["features"] = features.to(dtype)
    if not egpt.token_memory:
        return batch
    text = torch.randint(9, (2, 1 + 3 * egpt.chunk_size), generator=generator)  # they come again
    return batch | {"text": text}


def _global_norm(model: torch.nn.Module, grid: ProcessGrid) -> float:
    """The norm of the full gradients, replicated ones counted once."""
    total = sum(
        unshard(p.grad, spec_of(p), grid).double().square().sum() for p in model.parameters()
    )
    return math.sqrt(float(total))


def _run(config: ModelConfig, grid: ProcessGrid, dtype: torch.dtype, steps: int) -> dict:
    """First loss, logits, full gradients and norm; losses of a short training run; what the trained
    model computes with a cache.
    """
    model = build_model(config, grid).to(dtype)
    batch = _batch(config, 0, dtype)
    loss = model(**batch)
    loss.backward()
    with torch.no_grad():
        inputs = {n: x for n, x in batch.items() if n in ("tokens", "token_states", "features")}
        logits = model.head.full_logits(model.hidden_states(**inputs))
    result = {
        "loss": loss.item(),
        "logits": logits,
        "grads": {n: unshard(p.grad, spec_of(p), grid) for n, p in model.named_parameters()},
        "norm": _global_norm(model, grid),
        "losses": [],
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**_batch(config, step, dtype)) / 24
        loss.backward()
        optimizer.step()
        result["losses"].append(loss.item())
    return result | {"cached": _cached_logits(model, batch)}


@torch.no_grad()
def _cached_logits(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A GPT's logits, read from the cache in pieces; nothing of other models."""
    if model.config.kind != "gpt":
        return torch.zeros(1)
    cache = KVCache(model.config, model.grid, 2, 12, dtype=model.head.weight.dtype)
    pieces = batch["tokens"].split([7, 4, 1], dim=1)
    states = [model.hidden_states(piece, cache) for piece in pieces]
    return model.head.full_logits(torch.cat(states, dim=1))


def _relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def _gradient_difference(name: str, grad: torch.Tensor, alone: dict) -> float:
    """Relative to the parameter's largest gradient; a key bias's to the norm of all.

    Softmax ignores what a key bias adds, so its gradient is 0 but for rounding.
    """
    expected = alone["grads"][name]
    if name.endswith("key.bias"):
        return ((grad - expected).abs().max() / alone["norm"]).item()
    return _relative_difference(grad, expected)


def _differences(run: dict, alone: dict) -> dict[str, float]:
    """Largest relative differences of a run from the one without tensor parallelism."""
    return {
        "loss": abs(run["loss"] / alone["loss"] - 1),
        "logits": _relative_difference(run["logits"], alone["logits"]),
        "cached": _relative_difference(run["cached"], alone["cached"]),
        "norm": abs(run["norm"] / alone["norm"] - 1),
        "losses": max(
            (abs(a / b - 1) for a, b in zip(run["losses"], alone["losses"], strict=True)),
            default=0.0,
        ),
        "grads": max(_gradient_difference(key, grad, alone) for key, grad in run["grads"].items()),
    }


def _compare_all(
    configs: dict[str, ModelConfig], dtype: torch.dtype, steps: int
) -> dict[tuple[str, int], dict[str, float]]:
    return _compare(list(configs), lambda name, grid: _run(configs[name], grid, dtype, steps))


def _compare(
    names: list[str], run: Callable[[str, ProcessGrid], dict]
) -> dict[tuple[str, int], dict[str, float]]:
    """Differences of TP 2 and 4 from TP 1, by model and TP size. TP groups share the models out."""

    def own_runs(tp: int) -> Iterator[tuple[str, dict]]:
        grid = grid_for(tp)
        for name in names[grid.dp_rank :: grid.dp_size]:
            yield name, run(name, grid)

    alone: dict[str, dict] = {}
    for runs in all_gather_object(dict(own_runs(1)), grid_for(1)):
        alone |= runs
    return {
        (name, tp): _differences(run, alone[name]) for tp in (2, 4) for name, run in own_runs(tp)
    }


def _assert_same(
    ranks: list[dict[tuple[str, int], dict[str, float]]], names: Iterable[str], tolerance: float
) -> None:
    compared = Counter()
    for rank, differences in enumerate(ranks):
        for (name, tp), of_run in differences.items():
            compared[name, tp] += 1
            for what, difference in of_run.items():
                assert difference <= tolerance, (rank, name, tp, what, difference)
    assert compared == {(name, tp): tp for name in names for tp in (2, 4)}  # on each of its ranks


@pytest.mark.parametrize(
    ("names", "dtype", "tolerance"),
    [
        pytest.param(list(MODELS), torch.float64, 1e-9, id="fp64"),
        pytest.param(
            ["gpt", "egpt", "deepgpt"], torch.float32, 1e-5, id="fp32", marks=pytest.mark.long
        ),
    ],
)
def test_every_model_is_the_same_at_tp_1_2_and_4(distributed, names, dtype, tolerance):
    configs = {name: MODELS[name] for name in names}
    _assert_same(distributed(4, _compare_all, configs, dtype, STEPS), configs, tolerance)


def _shallow(config: ModelConfig) -> ModelConfig:
    """As few layers as have all kinds of layers."""
    return replace(config, num_layers=config.window_every or 1)


@pytest.mark.parametrize(
    "positions",
    [
        kind if kind == "rotary" else pytest.param(kind, marks=pytest.mark.long)
        for kind in POSITIONS
    ],
)
def test_every_variant_is_the_same_at_tp_1_2_and_4(distributed, positions):
    """Among them fewer key and value heads than ranks."""
    configs = {name: _shallow(variant(name, positions)) for name in ATTENTION}
    ranks = distributed(4, _compare_all, configs, torch.float64, VARIANT_STEPS)
    _assert_same(ranks, configs, 1e-9)


def _decoders() -> dict[str, ModelConfig]:
    """EGPT in its forms and DeepGPT with the blocks of Llama's families; EGPT's original form, in
    which rotary positions are the numbers of chunks, too.
    """
    forms = {name: config for name, config in MODELS.items() if config.kind != "gpt"}
    return {
        f"{name}-{block}": replace(
            variant(block, "rotary_extended", GPT), kind=form.kind, egpt=form.egpt
        )
        for name, form in forms.items()
        for block in ("qwen2", "qwen3", "olmo2")
    }


@pytest.mark.long
def test_every_decoder_with_llamas_block_is_the_same_at_tp_1_2_and_4(distributed):
    configs = _decoders()
    ranks = distributed(4, _compare_all, configs, torch.float64, VARIANT_STEPS)
    _assert_same(ranks, configs, 1e-9)


FAMILIES = {
    "gpt2": {},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {"num_key_value_heads": 4},  # whole projections are normed: each rank has a key head
}


def _compare_imported(folder: Path) -> dict[tuple[str, int], dict[str, float]]:
    return _compare(list(FAMILIES), lambda family, grid: _run_imported(folder / family, grid))


def _run_imported(weights: Path, grid: ProcessGrid) -> dict:
    model = empty_model(read_weights_config(weights)[0], grid)
    load_weights(model, weights, grid)
    model.double()
    loss = model(sequences(), sequences(seed=3))
    loss.backward()
    return {
        "loss": loss.item(),
        "logits": model.head.full_logits(model.hidden_states(sequences())),
        "grads": {n: unshard(p.grad, spec_of(p), grid) for n, p in model.named_parameters()},
        "norm": _global_norm(model, grid),
        "losses": [],
        "cached": torch.zeros(1),
    }


def test_an_imported_model_of_each_family_is_the_same_at_tp_1_2_and_4(
    tmp_path: Path, distributed: Distributed
) -> None:
    """Loss, logits and every gradient; with fewer key heads than ranks in most."""
    for family, changes in FAMILIES.items():
        random_model(family, **changes).save_pretrained(tmp_path / "theirs" / family)
        import_model(tmp_path / "theirs" / family, tmp_path / "ours" / family)
    _assert_same(distributed(4, _compare_imported, tmp_path / "ours"), FAMILIES, 1e-9)


def _dropout_gradients(recompute: str) -> dict[str, torch.Tensor]:
    grid = grid_for(2)
    config = replace(GPT, dropout=0.3)
    model = build_model(config, grid, activation_checkpointing=recompute)
    torch.manual_seed(5)
    model(**_batch(config, 0, torch.float32)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _recomputation_differences() -> float:
    kept = _dropout_gradients("none")
    return max(
        (kept[name] - grad).abs().max().item()
        for recompute in ("full", "selective")
        for name, grad in _dropout_gradients(recompute).items()
    )


def test_recomputed_blocks_see_the_same_dropout_under_tensor_parallelism(distributed):
    assert distributed(2, _recomputation_differences) == [0.0, 0.0]


def _compiled_differences() -> float:
    """From the same blocks not compiled. Every block must be one graph, or dynamo raises."""
    largest = 0.0
    for attention in ("multi_query", "latent"):
        config = variant(attention, "rotary")
        kept, compiled = (build_model(config, grid_for(2)) for _ in range(2))
        for block in compiled.stack.blocks:
            block.compile(backend="eager", fullgraph=True)
        for model in (kept, compiled):
            model(**_batch(config, 0, torch.float32)).backward()
        pairs = zip(kept.parameters(), compiled.parameters(), strict=True)
        largest = max(largest, *((a.grad - b.grad).abs().max().item() for a, b in pairs))
    return largest


def test_a_compiled_block_is_one_graph_under_tensor_parallelism(distributed):
    assert distributed(2, _compiled_differences) == [0.0, 0.0]
