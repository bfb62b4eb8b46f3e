"""Muon's steps in fp64: the same however a run is spread, and those of a second implementation."""

from __future__ import annotations

from typing import Any

import pytest

from megaegpt.config.run import RunConfig
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import Curve, run_config, train
from tests.tiny.models import ATTENTION
from tests.tiny.muon import Weights, farthest, train_in_fp64, train_naively

_FP64 = 1e-9
_MODELS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {
        "norm": "rms_norm",
        "mlp": "swiglu",
        "positions": "rotary",
        "bias": False,
        "num_kv_heads": 2,  # which four ranks share
        "tied_embeddings": False,
    },
    "egpt": {"kind": "egpt", "tied_embeddings": False},
    "latent": ATTENTION["latent"],
}
_LAYOUTS = {
    # Tensor parallel, ZeRO stage, micro-batch: of 4 ranks and 8 samples.
    "gpt": [(1, 0, 2), (1, 1, 1), (1, 2, 2), (2, 1, 4), (4, 2, 2)],
    "llama": [(1, 2, 1), (2, 0, 4), (4, 1, 8)],
    "egpt": [(1, 1, 2), (2, 2, 1)],
    "latent": [(2, 2, 4)],
}


def _config(model: str, tp: int = 1, stage: int = 0, micro_batch: int = 8) -> RunConfig:
    return run_config(
        model=_MODELS[model],
        parallel={"tensor_parallel_size": tp, "zero_stage": stage},
        training={"gradient_clipping": 0.0, "steps": 3, "micro_batch_size": micro_batch},
        optimizer={"kind": "muon", "warmup_steps": 2},
    )


def _train_all(configs: list[RunConfig]) -> list[Weights]:
    return [train_in_fp64(c, grid_for(c.parallel.tensor_parallel_size)) for c in configs]


@pytest.mark.parametrize("model", _LAYOUTS)
def test_every_layout_takes_the_steps_of_a_naive_muon(distributed: Distributed, model: str) -> None:
    """Tensor-parallel sizes, ZeRO stages, and one to four micro-batches a step; borders of
    partitions go through matrices.
    """
    naive = train_naively(_config(model))
    configs = [_config(model, *layout) for layout in _LAYOUTS[model]]
    for found in distributed(4, _train_all, configs):
        for config, weights in zip(configs, found, strict=True):
            assert farthest(weights, naive) <= _FP64, config.parallel


_BF16 = 5e-3
"""Of losses, over 10 steps at a high rate; 1.5e-3 was seen."""


def _train_in_bf16(configs: list[RunConfig]) -> list[Curve]:
    return [train(c, grid_for(c.parallel.tensor_parallel_size), 10) for c in configs]


def _in(precision: str, tp: int, stage: int) -> RunConfig:
    return run_config(
        model={"num_layers": 1},  # so that two partitions cut a matrix
        parallel={"tensor_parallel_size": tp, "zero_stage": stage},
        training={"precision": precision, "gradient_clipping": 1.0},
        optimizer={"kind": "muon", "lr": 0.01, "warmup_steps": 2},
    )


@pytest.mark.long
def test_in_bf16_it_learns_as_in_fp32(distributed: Distributed) -> None:
    """Stage 1, whose optimizer is another there, and stage 2; replicas stay equal."""
    layouts = [("fp32", 1, 1)] + [("bf16", tp, stage) for tp in (1, 2) for stage in (1, 2)]
    reference, *others = distributed(2, _train_in_bf16, [_in(*layout) for layout in layouts])[0]
    for layout, curve in zip(layouts[1:], others, strict=True):
        assert curve.losses == pytest.approx(reference.losses, rel=_BF16), layout
