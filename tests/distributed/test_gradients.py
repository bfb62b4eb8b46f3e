"""Gradient norms of a model's parts: those of plain torch, at every ZeRO stage and layout."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch

from megaegpt.config import LoggingConfig
from megaegpt.config.run import RunConfig
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.engine.engine import StepResult
from megaegpt.training.engine.gradients import ModuleNorms
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import make_engine, micro_batches, nats, run_config

CASES = [
    (0, "fp32"),
    (1, "fp32"),
    (2, "fp32"),
    (1, "bf16"),
    (2, "bf16"),
    (2, "fp16"),
    (3, "fp32"),
    (3, "bf16"),
]
PARTS = ["embeddings", "layer_00", "layer_01", "norm"]


def _config(stage: int, precision: str) -> RunConfig:
    config = run_config(
        parallel={"tensor_parallel_size": 2, "zero_stage": stage},
        training={"precision": precision},
    )
    return RunConfig(
        model=config.model,
        parallel=config.parallel,
        training=config.training,
        optimizer=config.optimizer,
        logging=LoggingConfig(gradient_norms=True, interval=2),
        deepspeed={"fp16": {"initial_scale_power": 10}} if precision == "fp16" else {},
    )


def _norms_of_two_steps() -> list[tuple[list[str], list[float], float, bool]]:
    found = []
    for stage, precision in CASES:
        config, grid = _config(stage, precision), grid_for(2)
        with _fp16_on_a_cpu():
            engine = make_engine(config, grid)
        first, second = (
            engine.train_step(step, micro_batches(step, config, grid)) for step in (0, 1)
        )
        found.append(_numbers(engine.module_norms.names, second, first.module_norms is None))
        engine.close()
    return found


def _fp16_on_a_cpu() -> Any:
    return mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", return_value=True)


def _numbers(
    names: list[str], result: StepResult, first_is_left_out: bool
) -> tuple[list[str], list[float], float, bool]:
    assert result.module_norms is not None
    return names, result.module_norms.tolist(), result.grad_norm.item(), first_is_left_out


def _expected(config: RunConfig) -> list[float]:
    """Of the second step, by one process of plain torch with the same update before it."""
    grid = ProcessGrid()
    engine = make_engine(_plain(config), grid)
    engine.train_step(0, micro_batches(0, config, grid))
    model = build_model(config.model, grid)
    model.load_state_dict(engine.model.state_dict())
    engine.close()
    batches = micro_batches(1, config, grid)
    tokens = sum(int((batch["targets"] != -100).sum()) for batch in batches)
    for batch in batches:
        (nats(model, batch) / tokens).backward()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    return ModuleNorms(model, plain, grid).measure(1.0).tolist()


def _plain(config: RunConfig) -> RunConfig:
    return RunConfig(model=config.model, training=config.training, optimizer=config.optimizer)


def test_norms_by_part_are_those_of_plain_torch_at_tp_2_x_dp_2(distributed: Distributed) -> None:
    (expected,) = distributed(1, _expected, _config(2, "fp32"))
    ranks = distributed(4, _norms_of_two_steps)
    assert all(rank == ranks[0] for rank in ranks), "every rank has the same"
    for (stage, precision), (names, norms, total, first_left_out) in zip(
        CASES, ranks[0], strict=True
    ):
        assert names == PARTS
        assert first_left_out, "steps between log lines cost nothing"
        exact = 1e-5 if precision == "fp32" else 3e-2
        assert norms == pytest.approx(expected, rel=exact), (stage, precision)
        assert math.sqrt(sum(norm**2 for norm in norms)) == pytest.approx(total, rel=1e-5)
