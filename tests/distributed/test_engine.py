"""Steps of the engine that are out of the ordinary, on two data-parallel ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.config.run import RunConfig
from megaegpt.model.build import build_model
from megaegpt.parallel.params import full_state
from megaegpt.training.engine.engine import Engine, StepResult
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import make_engine, micro_batches, nats, run_config

_PRECISIONS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")]


def _config(stage: int, precision: str) -> RunConfig:
    return run_config(parallel={"zero_stage": stage}, training={"precision": precision})


def _weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in full_state(engine.model, engine.grid)}


def _step(engine: Engine, config: RunConfig, step: int, **changes: Any) -> StepResult:
    batches = micro_batches(step, config, engine.grid)
    if "targets" in changes:
        batches = [{**b, "targets": torch.full_like(b["targets"], -100)} for b in batches]
    if "factor" in changes:
        batches = [{**batch, "factor": torch.tensor(changes["factor"])} for batch in batches]
    return engine.train_step(step, batches)


def _scaled_nats(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a micro-batch, times its ``factor`` if it has one."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "factor"}
    return nats(model, inputs) * batch.get("factor", 1.0)


def _each(configs: list[RunConfig], check: Any) -> None:
    for config in configs:
        engine = make_engine(config, grid_for(1), _scaled_nats)
        check(engine, config)
        engine.assert_replicas_equal()
        engine.close()


def _infinite_on_the_last_rank(engine: Engine, config: RunConfig) -> None:
    _step(engine, config, 0)
    before = _weights(engine)
    result = _step(engine, config, 1, factor=torch.inf if engine.grid.dp_rank == 1 else 1.0)
    assert not result.applied
    assert result.nonfinite
    assert result.grad_norm.item() == torch.inf
    assert all(before[name].equal(tensor) for name, tensor in _weights(engine).items())

    result = _step(engine, config, 2)
    assert result.applied
    assert torch.isfinite(result.loss)
    assert torch.isfinite(result.grad_norm)
    after = _weights(engine)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not before[name].equal(tensor) for name, tensor in after.items())


def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(distributed: Distributed) -> None:
    configs = [_config(stage, precision) for stage, precision in _PRECISIONS]
    distributed(2, _each, configs, _infinite_on_the_last_rank)


def _nothing_to_predict(engine: Engine, config: RunConfig) -> None:
    result = _step(engine, config, 0, targets=None)
    assert result.loss.item() == 0.0
    assert result.tokens.item() == 0
    assert result.grad_norm.item() == 0.0
    assert result.applied
    assert all(torch.isfinite(tensor).all() for tensor in _weights(engine).values())


def test_a_batch_without_targets_has_loss_zero(distributed: Distributed) -> None:
    configs = [_config(stage, precision) for stage, precision in _PRECISIONS]
    distributed(2, _each, configs, _nothing_to_predict)


def _accumulation_may_change(engine: Engine, config: RunConfig) -> None:
    batches = micro_batches(0, config, engine.grid)
    whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    before = _weights(engine)
    result = engine.train_step(0, [whole])
    assert result.applied
    other = make_engine(config, engine.grid)
    expected = other.train_step(0, batches)
    other.close()
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-5)
    assert any(not before[n].equal(t) for n, t in _weights(engine).items())


def test_the_number_of_micro_batches_is_the_callers(distributed: Distributed) -> None:
    distributed(2, _each, [_config(stage, "fp32") for stage in (0, 1, 2)], _accumulation_may_change)


def _drift_on_one_rank(tp: int) -> None:
    engine = make_engine(run_config(parallel={"tensor_parallel_size": tp}), grid_for(tp))
    engine.assert_replicas_equal()
    with torch.no_grad():
        engine.model.stack.norm.weight[0] += 1e-6 * engine.grid.rank
    with pytest.raises(AssertionError, match=r"stack\.norm\.weight differs"):
        engine.assert_replicas_equal()
    engine.close()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_replica_that_drifts_is_named_on_every_rank(distributed: Distributed, tp: int) -> None:
    distributed(2, _drift_on_one_rank, tp)


def _fp16_finds_its_scale(folder: Path) -> None:
    supported = mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", return_value=True)
    raw = {"fp16": {"initial_scale_power": 24, "hysteresis": 1}}
    for stage in (1, 2):
        config = dataclasses.replace(_config(stage, "fp16"), deepspeed=raw)
        with supported:
            engine, other = (make_engine(config, grid_for(1), _scaled_nats) for _ in range(2))
        before = _weights(engine)
        results = [_step(engine, config, step) for step in range(12)]
        skipped = [result for result in results if not result.applied]
        assert skipped, "the first scale must overflow"
        assert not any(result.nonfinite for result in skipped), "overflow is not an error in fp16"
        assert results[-1].applied
        assert engine.loss_scale == 2.0 ** (24 - len(skipped))
        assert any(not before[n].equal(t) for n, t in _weights(engine).items())

        infinite = _step(engine, config, 12, factor=torch.inf)
        assert not infinite.applied
        assert infinite.nonfinite, "but an infinite loss is"

        engine.save_state(folder / str(stage))
        dist.barrier()  # each rank has written its own files alone
        other.load_state(folder / str(stage))
        assert other.loss_scale == engine.loss_scale
        ours, theirs = _step(engine, config, 13), _step(other, config, 13)
        assert ours.loss.equal(theirs.loss)
        assert ours.grad_norm.equal(theirs.grad_norm)
        engine.close()
        other.close()


def test_fp16_skips_steps_until_its_loss_scale_fits(
    distributed: Distributed, tmp_path: Path
) -> None:
    distributed(2, _fp16_finds_its_scale, tmp_path)


def _norm_where_all_is_predicted(precision: str) -> float:
    """The gradient norm of a step whose targets have a probability of 1 - 4e-9."""
    config = run_config(
        model={"tied_embeddings": False},
        parallel={"zero_stage": 1},
        training={"precision": precision},
    )
    raw = {"fp16": {"initial_scale_power": 20}} if precision == "fp16" else {}
    config, grid = dataclasses.replace(config, deepspeed=raw), grid_for(1)
    model = build_model(config.model, grid, seed=3)
    with torch.no_grad():  # every state is the same, and only the head's row of token 5 knows it
        model.stack.norm.weight.zero_()
        model.stack.norm.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[5] = 24 / config.model.hidden_size
    batches = [
        {**batch, "targets": torch.full_like(batch["targets"], 5)}
        for batch in micro_batches(0, config, grid)
    ]
    with mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", return_value=True):
        engine = Engine(model, grid, config, nats)
    result = engine.train_step(0, batches)
    engine.close()
    assert result.applied
    return result.grad_norm.item()


def _both_norms() -> tuple[float, float]:
    return _norm_where_all_is_predicted("fp16"), _norm_where_all_is_predicted("fp32")


def test_gradients_below_fp16s_smallest_number_are_saved_by_the_loss_scale(
    distributed: Distributed,
) -> None:
    for narrow, wide in distributed(2, _both_norms):
        assert wide > 0
        assert narrow == pytest.approx(wide, rel=0.05)
