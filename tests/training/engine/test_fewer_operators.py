"""DeepSpeed's steps by fewer operators: how many, and that nothing else changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaegpt.config.run import RunConfig
from megaegpt.training.engine import engine as engines
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import Curve, advance, make_engine, micro_batches, nats, run_config


class Operators(TorchDispatchMode):
    """Counts those that compute or copy something, which views do not, and values that the host
    reads, for which it waits on a GPU. Tokens are looked at on a CPU only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        reads = func.overloadpacket.__name__ == "_local_scalar_dense"
        self.waits += reads and args[0].dtype != torch.int64
        return func(*args, **(kwargs or {}))


def _run(blocks: int, stage: int, precision: str, optimizer: str = "adamw") -> RunConfig:
    return run_config(
        model={"num_layers": blocks},
        parallel={"zero_stage": stage},
        training={"precision": precision, "micro_batch_size": 8},
        optimizer={"kind": optimizer},
    )


def _operators(configs: list[RunConfig]) -> list[tuple[int, int, int]]:
    """Of a step, and of the model's forward and backward pass in it; and a step's waits."""
    found = []
    for config in configs:
        engine = make_engine(config, grid_for(1))
        (batch,) = micro_batches(0, config, engine.grid)
        engine.train_step(0, [batch])
        with Operators() as step:
            engine.train_step(1, [batch])
        engine.close()
        with Operators() as alone:
            nats(engine.model, batch).backward()
        found.append((step.count, alone.count, step.waits))
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "a_parameter", "waits"),
    [(1, "bf16", 0.1, 2), (2, "bf16", 3.1, 3), (1, "fp32", 2.1, 3)],
)
def test_operators_of_a_step_are_few_and_grow_slowly_with_the_model(
    distributed: Distributed, stage: int, precision: str, a_parameter: float, waits: int
) -> None:
    """DeepSpeed by itself has 19 a parameter at stage 2, 4 at stage 1 in bf16, 4 in fp32. The host
    waits for the norm before the update, and for nothing that grows with the model.
    """
    configs = [_run(blocks, stage, precision) for blocks in (6, 12)]
    ((small, large),) = distributed(1, _operators, configs)
    assert large[0] <= 1300
    assert large[0] - large[1] <= 120 + a_parameter * 16 * 12
    growth = (large[0] - large[1]) - (small[0] - small[1])
    assert growth <= a_parameter * 16 * 6
    assert small[2] == large[2] <= waits


def test_muons_waits_do_not_grow_with_its_matrices(distributed: Distributed) -> None:
    """What it iterates on never comes to the host; at stage 2 it waits once more than AdamW."""
    kinds = [
        (blocks, stage, "bf16", kind)
        for stage in (1, 2)
        for blocks, kind in ((2, "adamw"), (2, "muon"), (4, "muon"))
    ]
    (found,) = distributed(1, _operators, [_run(*kind) for kind in kinds])
    adamw_1, *muon_1, adamw_2, few_2, many_2 = (waits for _, _, waits in found)
    assert muon_1 == [adamw_1] * 2
    assert few_2 == many_2 <= adamw_2 + 1


def _train(configs: list[RunConfig], by_deepspeed: bool) -> list[Curve]:
    curves = []
    for config in configs:
        with pytest.MonkeyPatch.context() as patch:
            if by_deepspeed:
                patch.setattr(engines, "use_fewer_operators", lambda optimizer, grid: None)
                raw = {"zero_optimization": {"reduce_scatter": True}}
                config = dataclasses.replace(config, deepspeed=raw)
            engine = make_engine(config, grid_for(config.parallel.tensor_parallel_size))
        curve = advance(engine, config, range(3))
        curve.weights = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        engine.close()
        curves.append(curve)
    return curves


def test_steps_are_those_of_deepspeed_itself_to_the_bit(distributed: Distributed) -> None:
    configs = [
        run_config(parallel={"zero_stage": stage}, training={"precision": precision})
        for stage, precision in [(1, "bf16"), (2, "bf16"), (2, "fp32")]
    ]
    ours, theirs = (distributed(2, _train, configs, given) for given in (False, True))
    for rank in range(2):
        for config, a, b in zip(configs, ours[rank], theirs[rank], strict=True):
            assert min(a.norms) > config.training.gradient_clipping
            assert (a.losses, a.norms) == (b.losses, b.norms), config
            assert all(torch.equal(a.weights[name], b.weights[name]) for name in b.weights), config


def test_tensor_parallel_steps_are_those_of_deepspeed_itself(distributed: Distributed) -> None:
    configs = [
        run_config(
            parallel={"zero_stage": stage, "tensor_parallel_size": 2},
            training={"precision": "bf16"},
        )
        for stage in (1, 2)
    ]
    ours, theirs = (distributed(2, _train, configs, given)[0] for given in (False, True))
    for a, b in zip(ours, theirs, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-6)
        assert a.norms == pytest.approx(b.norms, rel=1e-6)


def _spoil_one_rank() -> tuple[bool, float]:
    """One gradient of a replicated parameter is infinite, on the second rank alone."""
    config = run_config(
        parallel={"zero_stage": 2, "tensor_parallel_size": 2}, training={"precision": "bf16"}
    )
    engine = make_engine(config, grid_for(2))
    if engine.grid.tp_rank == 1:
        weight = engine.model.get_parameter("stack.norm.weight")
        weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    result = engine.train_step(0, micro_batches(0, config, engine.grid))
    engine.close()
    return result.applied, result.grad_norm.item()


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    distributed: Distributed,
) -> None:
    assert distributed(2, _spoil_one_rank) == [(False, float("inf"))] * 2
