"""Steps whose gradient norm stands out are left out alike on all ranks, in every layout."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megaegpt.config.run import RunConfig
from megaegpt.config.training import SpikeGuardConfig
from megaegpt.parallel.partitions import held
from megaegpt.training.engine.engine import Engine, StepResult
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny import runs
from tests.tiny.engines import make_engine, micro_batches, nats, run_config
from tests.tiny.runs import StopAfter, corpus

__all__ = ["corpus"]

LAYOUTS: list[tuple[Any, ...]] = [
    # Tensor parallel, ZeRO stage, precision: of two ranks.
    (2, 0, "fp32"),
    (1, 2, "fp32"),
    (1, 1, "bf16"),
    (1, 2, "fp16"),
    (1, 3, "bf16"),
    (1, 3, "bf16", "optimizer"),  # offloaded
]

GUARD = SpikeGuardConfig(factor=5.0, window=3)


def _scaled_nats(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "factor"}
    return nats(model, inputs) * batch["factor"]


def _step(engine: Engine, config: RunConfig, step: int, factor: float = 1.0) -> StepResult:
    """A step in which the last data-parallel rank's losses are so many times what they are."""
    own = factor if engine.grid.dp_rank == engine.grid.dp_size - 1 else 1.0
    batches = [b | {"factor": torch.tensor(own)} for b in micro_batches(step, config, engine.grid)]
    return engine.train_step(step, batches)


def _meet_a_spike(tp: int, stage: int, precision: str, offload: str = "none") -> list[float]:
    config = run_config(
        parallel={"tensor_parallel_size": tp, "zero_stage": stage, "offload": offload},
        training={"precision": precision, "spike_guard": GUARD},
    )
    if precision == "fp16":
        config = dataclasses.replace(config, deepspeed={"fp16": {"initial_scale_power": 8}})
    with mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", return_value=True):
        engine = make_engine(config, grid_for(tp), _scaled_nats)
    usual = [_step(engine, config, step) for step in range(4)]
    assert all(result.applied and result.spike is None for result in usual), (precision, usual)
    before = {name: held(p).detach().clone() for name, p in engine.model.named_parameters()}
    scale, norms = engine.loss_scale, sorted(result.grad_norm.item() for result in usual[1:])
    spike = _step(engine, config, 4, factor=30.0)
    assert not spike.applied
    assert not spike.nonfinite
    assert spike.spike == pytest.approx(norms[1], rel=1e-3)
    assert 5 * norms[1] < spike.grad_norm.item() < 100 * norms[1]
    assert engine.loss_scale == scale
    for name, parameter in engine.model.named_parameters():
        assert held(parameter).equal(before[name]), name
    after = _step(engine, config, 5)
    assert after.applied
    assert any(not held(p).equal(before[name]) for name, p in engine.model.named_parameters())
    engine.assert_replicas_equal()
    engine.close()
    return [spike.grad_norm.item(), spike.spike, after.loss.item()]


def _meet_spikes(layouts: list[tuple[Any, ...]]) -> list[list[float]]:
    return [_meet_a_spike(*layout) for layout in layouts]


def test_a_spike_changes_no_weight_and_no_loss_scale(distributed: Distributed) -> None:
    first, second = distributed(2, _meet_spikes, LAYOUTS)
    assert first == second, "every rank decides alike"


def _run(config: RunConfig, resume: bool = False, stop_after: int = 99) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        pretrain(config, grid_for(1), resume=resume, stops=StopAfter(stop_after))
    return shown.getvalue()


def _straight_and_interrupted(corpus: Path, folder: Path) -> str:
    def config(name: str) -> RunConfig:
        guard = SpikeGuardConfig(factor=1.0, window=3)  # about every other norm is above the median
        training = {"steps": 12, "eval_interval": 12, "spike_guard": guard}
        return runs.run_config("gpt", corpus, folder / name, training=training)

    shown = _run(config("straight"))
    _run(config("interrupted"), stop_after=7)
    _run(config("interrupted"), resume=True)
    return shown


def test_a_run_names_and_counts_them_and_resumes_exactly(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _straight_and_interrupted, corpus, tmp_path)
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    assert runs.losses(straight) == runs.losses(interrupted)
    by_step = [
        {r["step"]: r["spikes"] for r in runs.records(folder) if "spikes" in r}
        for folder in (straight, interrupted)
    ]
    assert by_step[0] == {step: by_step[1][step] for step in by_step[0]}  # it reported step 7 too
    counts = list(by_step[0].values())
    assert counts == sorted(counts)
    assert 2 <= counts[-1] <= 9
    assert shown.count("skipped: step ") == counts[-1]
    assert f"| spikes {counts[-1]}\n" in shown
    assert " is above 1 times " in shown
    assert "the median of 3 steps (training.spike_guard; samples " in shown
    weights = "checkpoints/step_00000012/weights/model.safetensors"
    assert (straight / weights).read_bytes() == (interrupted / weights).read_bytes()
