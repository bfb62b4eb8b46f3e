"""Learning rates and weight decays by parameter group, against plain torch in fp64, and resumed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megaegpt.config import EGPTConfig
from megaegpt.config.parameter_groups import ParameterGroup
from megaegpt.config.run import RunConfig
from megaegpt.errors import ConfigError
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.engine import engine as engine_module
from megaegpt.training.engine import optimizer as optimizer_module
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import Curve, advance, make_engine, run_config
from tests.tiny.muon import Weights, farthest, train_in_fp64, train_naively

_GROUPS = (
    ParameterGroup("embedding.*", lr_scale=0.1, weight_decay=0.0),
    ParameterGroup("*.up.*", lr_scale=0.5),
    ParameterGroup("*.bias", weight_decay=0.2),
    ParameterGroup("stack.blocks.1.*", lr_scale=3.0),
)


def _settings(name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """What the groups say, written out: factor of the learning rate, and weight decay."""
    usual = 0.1 if parameter.dim() >= 2 else 0.0
    if name.startswith("embedding."):
        return 0.1, 0.0
    if ".up." in name:
        return 0.5, usual
    if name.endswith(".bias"):
        return 1.0, 0.2
    return (3.0 if name.startswith("stack.blocks.1.") else 1.0), usual


def _config(kind: str = "adamw", tp: int = 1, stage: int = 0, micro_batch: int = 8) -> RunConfig:
    return run_config(
        parallel={"tensor_parallel_size": tp, "zero_stage": stage},
        training={"gradient_clipping": 0.0, "steps": 3, "micro_batch_size": micro_batch},
        optimizer={"kind": kind, "warmup_steps": 2, "groups": _GROUPS},
    )


def _train_all(configs: list[RunConfig]) -> list[Weights]:
    return [train_in_fp64(c, grid_for(c.parallel.tensor_parallel_size)) for c in configs]


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=pytest.mark.long)])
def test_every_layout_takes_the_steps_of_plain_torch_with_the_same_groups(
    distributed: Distributed, kind: str
) -> None:
    layouts = [(1, 0, 2), (1, 2, 2), (2, 1, 4)] if kind == "adamw" else [(1, 1, 2), (2, 2, 4)]
    plain = train_naively(_config(kind), _settings)
    configs = [_config(kind, *layout) for layout in layouts]
    for found in distributed(4, _train_all, configs):
        for config, weights in zip(configs, found, strict=True):
            assert farthest(weights, plain) <= 1e-9, config.parallel


def _save_with_groups(configs: list[RunConfig], folder: Path) -> list[Curve]:
    """Two steps with each configuration, saved; the third is the curve."""
    curves = []
    for number, config in enumerate(configs):
        engine = make_engine(config, grid_for(1))
        advance(engine, config, range(2))
        CheckpointManager(folder / str(number), keep=1).save(engine, 2, {})
        curves.append(advance(engine, config, range(2, 3)))
        engine.close()
    return curves


def _load_with_other_groups(configs: list[RunConfig], folder: Path) -> list[tuple[Curve, Any]]:
    """The third step, and the settings that the optimizer has."""
    found = []
    for number, config in enumerate(configs):
        engine = make_engine(config, grid_for(1))
        CheckpointManager(folder / str(number), keep=1).load(engine)
        curve = advance(engine, config, range(2, 3))
        groups = [(g["weight_decay"], g.get("lr_scale")) for g in engine.optimizer.param_groups]
        engine.close()
        found.append((curve, groups))
    return found


@pytest.mark.long
def test_groups_may_change_when_a_run_goes_on(distributed: Distributed, tmp_path: Path) -> None:
    """State goes to other groups by name; groups that say the usual give the same step."""
    split = (ParameterGroup("*.bias"), ParameterGroup("stack.blocks.[01].*"))

    def config(stage: int, groups: tuple[ParameterGroup, ...]) -> RunConfig:
        return run_config(
            parallel={"zero_stage": stage},
            training={"steps": 3, "micro_batch_size": 2},
            optimizer={"warmup_steps": 2, "groups": groups},
        )

    ways = [(0, (), split), (2, split, ()), (1, (), split)]
    before = [config(stage, groups) for stage, groups, _ in ways]
    after = [config(stage, groups) for stage, _, groups in ways]
    curves = distributed(2, _save_with_groups, before, tmp_path)[0]
    found = distributed(2, _load_with_other_groups, after, tmp_path)[0]
    for way, curve, (resumed, _) in zip(ways, curves, found, strict=True):
        assert resumed.losses == pytest.approx(curve.losses, rel=1e-6), way
        for name, weight in curve.weights.items():
            assert (weight - resumed.weights[name]).abs().max() <= 1e-7, (way, name)
    assert [groups for _, groups in found][1] == [(0.1, None), (0.0, None)]
    rest = [(0.1, 1.0), (0.0, 1.0)]  # matrices, and vectors that are no biases
    assert [groups for _, groups in found][2] == [(0.0, 1.0), *rest, *rest]


@pytest.mark.long
def test_a_group_that_leaves_ranks_without_a_share_goes_on_in_other_groups(
    distributed: Distributed, tmp_path: Path
) -> None:
    """Four numbers over four ranks, of which DeepSpeed gives two to each of two."""
    egpt = EGPTConfig(num_chunks=3, chunk_size=8, memory_gate=True)
    gates = (ParameterGroup("stack.blocks.0.attention.gate"),)

    def config(stage: int, precision: str, groups: tuple[ParameterGroup, ...]) -> RunConfig:
        return run_config(
            model={"kind": "egpt", "tied_embeddings": False, "egpt": egpt},
            parallel={"zero_stage": stage},
            training={"steps": 3, "micro_batch_size": 2, "precision": precision},
            optimizer={"warmup_steps": 2, "groups": groups},
        )

    ways = [(2, "fp32", gates, ()), (2, "fp32", (), gates), (1, "bf16", gates, ())]
    before = [config(stage, precision, groups) for stage, precision, groups, _ in ways]
    after = [config(stage, precision, groups) for stage, precision, _, groups in ways]
    curves = distributed(4, _save_with_groups, before, tmp_path)[0]
    found = distributed(4, _load_with_other_groups, after, tmp_path)[0]
    for way, curve, (resumed, _) in zip(ways, curves, found, strict=True):
        assert resumed.losses == pytest.approx(curve.losses, rel=1e-6), way
        for name, weight in curve.weights.items():
            close = 1e-7 if way[1] == "fp32" else 1e-2  # a unit in the last place
            assert (weight - resumed.weights[name]).abs().max() <= close, (way, name)


def _resume_from_before_rows_were_vectors(folder: Path) -> list[tuple[Curve, Curve, str]]:
    """The third step without and with a stop, at several stages, and what is said on resuming."""
    egpt = EGPTConfig(num_chunks=3, chunk_size=8, token_memory=True, memory_dim=4)
    found = []
    for stage in (0, 1):
        config = run_config(
            model={"kind": "egpt", "tied_embeddings": False, "egpt": egpt},
            parallel={"zero_stage": stage},
            training={"steps": 3},
            optimizer={"warmup_steps": 2, "weight_decay": 0.0},
        )
        with pytest.MonkeyPatch.context() as earlier:
            earlier.setattr(engine_module, "marked_vectors", lambda _: [])
            earlier.setattr(optimizer_module, "marked_vectors", lambda _: [])
            earlier.setattr(optimizer_module, "is_vector", lambda p: p.dim() < 2)
            (curve,) = _save_with_groups([config], folder / str(stage))
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            ((resumed, _),) = _load_with_other_groups([config], folder / str(stage))
        found.append((curve, resumed, shown.getvalue()))
    return found


@pytest.mark.long
def test_a_checkpoint_in_which_a_memorys_numbers_decayed_goes_on(
    distributed: Distributed, tmp_path: Path
) -> None:
    found = distributed(1, _resume_from_before_rows_were_vectors, tmp_path)[0]
    for curve, resumed, told in found:
        assert "without decay token_memory.distance token_memory.bonus" in told
        assert resumed.losses == pytest.approx(curve.losses, rel=1e-6)
        for name, weight in curve.weights.items():
            assert (weight - resumed.weights[name]).abs().max() <= 1e-7, name


def _error_of(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as raised:
        make_engine(config, grid_for(1))
    return str(raised.value)


def test_a_pattern_without_a_parameter_ends_all_ranks_with_one_line(
    distributed: Distributed,
) -> None:
    config = run_config(optimizer={"groups": (ParameterGroup("lm_head.*"),)})
    first, second = distributed(2, _error_of, config)
    assert first == second
    assert first.startswith("optimizer.groups[0].match: 'lm_head.*' matches no trainable parameter")
