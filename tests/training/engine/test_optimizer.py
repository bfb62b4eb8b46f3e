"""The parameter groups of an optimizer, beside those that whole runs show."""

from __future__ import annotations

from dataclasses import replace

from megaegpt.config import EGPTConfig, LoRAConfig, ModelConfig, OptimizerConfig
from megaegpt.config.parameter_groups import ParameterGroup
from megaegpt.model.adapters import add_adapters
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.engine.optimizer import LR_SCALE, parameter_groups

GPT = ModelConfig(vocab_size=90, max_seq_len=8, hidden_size=32, num_layers=1, num_heads=4)


def test_adapters_have_groups_and_frozen_weights_have_none() -> None:
    """As for LoRA+, whose second factors learn faster."""
    model = build_model(GPT, ProcessGrid())
    add_adapters(model, LoRAConfig(rank=2, targets=("query", "value")))
    groups = (ParameterGroup("*.lora.b", lr_scale=16.0),)
    fast, usual = parameter_groups(model, OptimizerConfig(groups=groups))
    layers = [f"stack.blocks.0.attention.{name}" for name in ("query", "value")]
    assert fast["names"] == [f"{layer}.lora.b" for layer in layers]
    assert usual["names"] == [f"{layer}.lora.a" for layer in layers]
    assert (fast[LR_SCALE], usual[LR_SCALE]) == (16.0, 1.0)


def test_without_entries_groups_are_as_they_always_were() -> None:
    """Their keys are in checkpoints."""
    groups = parameter_groups(build_model(GPT, ProcessGrid()), OptimizerConfig())
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2


def test_a_token_memorys_numbers_do_not_decay_and_its_projections_do() -> None:
    """One pointer's or several, by whatever shape they have."""
    egpt = EGPTConfig(num_chunks=3, chunk_size=8, token_memory=True, memory_dim=4)
    model = build_model(replace(GPT, kind="egpt", egpt=egpt), ProcessGrid())
    decayed, free = parameter_groups(model, OptimizerConfig())
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {name for name, _ in model.token_memory.named_parameters()}
    found = {n.removeprefix("token_memory.") for n in decayed["names"] if "token_memory" in n}
    assert found == {"query", "key", "gate"}
    assert {f"token_memory.{name}" for name in names - found} <= {*free["names"]}
