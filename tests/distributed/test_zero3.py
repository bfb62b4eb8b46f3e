"""ZeRO stage 3: parameters are cut over the ranks, and no number changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from megaegpt.config import EGPTConfig
from megaegpt.config.run import RunConfig
from megaegpt.parallel.params import full_state
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import (
    Curve,
    largest_difference,
    make_engine,
    micro_batches,
    run_config,
    train_plainly,
)

_STEPS = 10
_LLAMA = {"norm": "rms_norm", "mlp": "swiglu", "bias": False, "positions": "rotary"}
_MEMORY = {"token_memory": True, "memory_dim": 8, "memory_pointers": 2}
_EXTENDED = {"local_attention": True, "features_per_chunk": 2, "memory_gate": True}
_RESIDUAL = {"adapter_norm": True, "adapter_residual": True, "attention_sink": True}
_EGPT = EGPTConfig(num_chunks=3, chunk_size=8)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": _LLAMA | {"num_kv_heads": 2, "tied_embeddings": False},
    "latent": {"attention": "latent", "latent_dim": 12, "positions": "rotary", "rope_head_dim": 4},
    "egpt": {"kind": "egpt"},
    "egpt_extended": {
        "kind": "egpt",
        "egpt": dataclasses.replace(_EGPT, **_EXTENDED, **_RESIDUAL),
    },
    "egpt_memory": {"kind": "egpt", "egpt": dataclasses.replace(_EGPT, **_MEMORY)},
    "deepgpt": {"kind": "deepgpt"},
}


def _config(name: str, **parallel: Any) -> RunConfig:
    model = MODELS[name]
    tied = model.get("tied_embeddings", model.get("kind", "gpt") == "gpt")
    config = run_config(
        model={**model, "tied_embeddings": tied},
        parallel={"zero_stage": 3, **parallel},
        training={"steps": _STEPS},
    )
    zero = {"stage3_param_persistence_threshold": 0, "reduce_scatter": False}
    # Parameters of any size are cut; and DeepSpeed would refuse to add up gradients in fp64.
    return dataclasses.replace(config, deepspeed={"zero_optimization": zero})


@contextmanager
def double_precision() -> Iterator[None]:
    """Let models be in fp64, and DeepSpeed keep weights and moments and send gradients in it, for
    which its configuration has no word.
    """
    double, optimizer = torch.float64, DeepSpeedZeroOptimizer_Stage3
    torch.set_default_dtype(double)
    with (
        mock.patch.object(DeepSpeedEngine, "get_data_types", return_value=(double, double)),
        mock.patch.object(DeepSpeedEngine, "communication_data_type", double),
        mock.patch.object(optimizer, "_configure_master_weights", return_value=double),
    ):
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def _trained(config: RunConfig) -> Curve:
    """With norms as precise as they are computed."""
    engine = make_engine(config, grid_for(config.parallel.tensor_parallel_size))
    curve = Curve()
    for step in range(_STEPS):
        result = engine.train_step(step, micro_batches(step, config, engine.grid))
        curve.losses.append(result.loss.item())
        curve.norms.append(float(vars(engine.optimizer)["_global_grad_norm"]))
        curve.applied.append(result.applied)
    curve.weights = {n: t.clone() for n, t in full_state(engine.model, engine.grid)}
    engine.assert_replicas_equal()
    engine.close()
    return curve


def _differences(configs: list[RunConfig]) -> list[float]:
    """Of each run from that of one rank in plain torch."""
    found = []
    with double_precision():
        for config in configs:
            found.append(largest_difference(_trained(config), train_plainly(config, torch.float64)))
    return found


def test_runs_are_the_same_as_on_one_rank_in_double_precision(distributed: Distributed) -> None:
    configs = [_config(name) for name in ("gpt2", "egpt")]
    for differences in distributed(2, _differences, configs):
        assert max(differences) <= 1e-9, differences


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_runs_of_every_kind_of_model_are_the_same_as_on_one_rank(
    distributed: Distributed, ranks: int
) -> None:
    configs = [_config(name) for name in MODELS]
    if ranks == 4:
        configs += [
            _config(name, tensor_parallel_size=2, sequence_parallel=sequence)
            for name, sequence in (("gpt2", True), ("llama", False), ("egpt_memory", True))
        ]
    for differences in distributed(ranks, _differences, configs, timeout=600):
        assert max(differences) <= 1e-9, differences
