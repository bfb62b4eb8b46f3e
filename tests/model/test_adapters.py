"""Adapters: the same model at the start, the same at any tensor-parallel size, the same merged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megaegpt.config import EGPTConfig, LoRAConfig, ModelConfig
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.model.adapter_files import Base, load_merged, read_adapter, save_adapter
from megaegpt.model.adapters import add_adapters, initialize_adapters, target_layers
from megaegpt.model.attention.cache import KVCache
from megaegpt.model.build import Model, build_model, empty_model
from megaegpt.model.weights import read_weights_config, save_weights, tensors_digest
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of, unshard
from tests.distributed.harness import Distributed, grid_for

GRID = ProcessGrid()
LORA = LoRAConfig(rank=3, alpha=6.0)
GPT = ModelConfig(vocab_size=300, max_seq_len=12, hidden_size=32, num_layers=2, num_heads=4)
MODELS = {
    "gpt": GPT,
    "one_key_head": dataclasses.replace(
        GPT, num_kv_heads=1, positions="rotary", mlp="swiglu", norm="rms_norm", bias=False
    ),
    "latent": dataclasses.replace(
        GPT,
        attention="latent",
        latent_dim=8,
        query_latent_dim=8,
        positions="rotary",
        rope_head_dim=4,
    ),
    "egpt": dataclasses.replace(
        GPT,
        kind="egpt",
        bias=False,
        egpt=EGPTConfig(num_chunks=3, chunk_size=4, local_attention=True),
    ),
}


def with_adapters(config: ModelConfig, grid: ProcessGrid, dtype: Any, **changes: Any) -> Model:
    """An adapter that matters: b is drawn too."""
    model = build_model(config, grid, seed=1).to(dtype)
    add_adapters(model, dataclasses.replace(LORA, **changes))
    for layer in target_layers(model, LORA).values():
        assert layer.lora is not None
        spec = spec_of(layer.lora.b)
        layer.lora.b.tp_spec = dataclasses.replace(spec, init_std=0.2)  # type: ignore[attr-defined]
    initialize_adapters(model, 2, grid)
    return model


def batch_of(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if config.kind == "gpt":
        tokens = torch.randint(300, (2, 13), generator=generator)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].clone()}
    states = torch.randn(2, 3, 4, 32, generator=generator, dtype=torch.float64).to(dtype)
    features = torch.randn(2, 2, 32, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(300, (2, 3, 4), generator=generator)
    return {"token_states": states, "features": features, "targets": targets}


@pytest.mark.parametrize("name", MODELS)
def test_at_the_start_the_model_is_its_base_and_adapters_alone_learn(name: str) -> None:
    model = build_model(MODELS[name], GRID, seed=1)
    batch = batch_of(MODELS[name], torch.float32)
    before = model(**batch)
    add_adapters(model, LORA)
    initialize_adapters(model, 1, GRID)
    loss = model(**batch)
    assert torch.equal(loss, before)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        is_adapter = ".lora." in parameter_name
        assert (parameter.grad is not None) == is_adapter == parameter.requires_grad
        if parameter_name.endswith(".lora.b"):
            assert parameter.grad.abs().max() > 0


def test_targets_are_named_by_group_or_by_layer() -> None:
    model = build_model(MODELS["latent"], GRID)
    found = target_layers(model, LoRAConfig(rank=1, targets=("latent", "mlp")))
    assert [name.removeprefix("stack.blocks.") for name in found] == [
        "0.attention.latent.down", "0.mlp.up", "0.mlp.down",
        "1.attention.latent.down", "1.mlp.up", "1.mlp.down",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"has no gate; it has down, key, latent, output"):
        target_layers(model, LoRAConfig(rank=1, targets=("mlp", "gate")))


def _gradients(name: str, tp_size: int, dropout: float) -> dict[str, Any]:
    grid, config = grid_for(tp_size), MODELS[name]
    model = with_adapters(config, grid, torch.float64, dropout=dropout)
    torch.manual_seed(5)
    loss = model(**batch_of(config, torch.float64))
    loss.backward()
    found = {
        n: unshard(p.grad, spec_of(p), grid) for n, p in model.named_parameters() if p.requires_grad
    }
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_same_at_any_tensor_parallel_size(
    name: str, distributed: Distributed
) -> None:
    (alone,) = distributed(1, _gradients, name, 1, 0.0)
    for cut in distributed(2, _gradients, name, 2, 0.0):
        assert cut.keys() == alone.keys()
        for key, value in alone.items():
            assert torch.allclose(cut[key], value, rtol=1e-9, atol=1e-12), key


def test_dropout_agrees_between_ranks_where_they_hold_the_same(distributed: Distributed) -> None:
    first, second = distributed(2, _gradients, "gpt", 2, 0.5)
    for key, value in first.items():
        assert torch.equal(second[key], value), key
    (again, _) = distributed(2, _gradients, "gpt", 2, 0.5)
    without, _ = distributed(2, _gradients, "gpt", 2, 0.0)
    assert torch.equal(again["loss"], first["loss"])
    assert not torch.equal(without["loss"], first["loss"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@torch.no_grad()
def test_merged_weights_compute_what_adapters_do(
    name: str, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    config = MODELS[name]
    save_weights(build_model(config, GRID, seed=1), tmp_path / "base", GRID)
    model = with_adapters(config, GRID, dtype).eval()
    base = Base("base", tensors_digest(tmp_path / "base"))
    save_adapter(model, tmp_path / "adapter", GRID, LORA, base)
    merged = empty_model(config, GRID).to(dtype).eval()
    load_merged(merged, read_adapter(tmp_path / "adapter"), tmp_path / "base", GRID)
    batch = batch_of(config, dtype)
    inputs = {key: value for key, value in batch.items() if key != "targets"}
    ours, theirs = (m.head.full_logits(m.hidden_states(**inputs)) for m in (merged, model))
    assert (ours - theirs).abs().max() <= bound * max(1.0, theirs.abs().max())


@torch.no_grad()
def test_absorbed_projections_see_the_adapter() -> None:
    """Latent attention decodes by its weights, and not by its layers."""
    model = with_adapters(MODELS["latent"], GRID, torch.float64).eval()
    tokens = batch_of(MODELS["latent"], torch.float64)["tokens"]
    cache = KVCache(model.config, GRID, 2, 12, dtype=torch.float64)
    pieces = [model.hidden_states(piece, cache) for piece in tokens.split([7, 4, 1], dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), model.hidden_states(tokens), atol=1e-12)


def test_another_base_is_refused(tmp_path: Path) -> None:
    for folder, seed in (("base", 1), ("other", 2)):
        save_weights(build_model(GPT, GRID, seed=seed), tmp_path / folder, GRID)
    base = Base("base", tensors_digest(tmp_path / "base"))
    save_adapter(with_adapters(GPT, GRID, torch.float32), tmp_path / "adapter", GRID, LORA, base)
    with pytest.raises(CheckpointError, match=r"trained beside other weights than .*other"):
        load_merged(
            empty_model(GPT, GRID), read_adapter(tmp_path / "adapter"), tmp_path / "other", GRID
        )
    with pytest.raises(CheckpointError, match=r"is an adapter and no whole model: merge it"):
        read_weights_config(tmp_path / "adapter")
