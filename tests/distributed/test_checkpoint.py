"""Checkpoints of real engines: exact resume, other topologies, damage, and failures on one rank."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from megaegpt.config.parameter_groups import ParameterGroup
from megaegpt.config.run import RunConfig
from megaegpt.errors import CheckpointError
from megaegpt.training.checkpoint.manager import CheckpointManager
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny import runs as tiny
from tests.tiny.engines import Curve, advance, make_engine, micro_batches, run_config
from tests.tiny.models import ATTENTION
from tests.tiny.runs import corpus

__all__ = ["corpus"]

_SAVED, _END = 3, 5
_GROUPS = (
    ParameterGroup("embedding.*", lr_scale=0.1),
    ParameterGroup("*.bias", weight_decay=0.2),
)


def _config(kind: str = "gpt", tp: int = 1, stage: int = 2, **changes: Any) -> RunConfig:
    training = {"global_batch_size": 4, "micro_batch_size": 1, **changes.pop("training", {})}
    model = {"kind": kind, "tied_embeddings": kind == "gpt", **changes.pop("model", {})}
    parallel = {"tensor_parallel_size": tp, "zero_stage": stage, **changes.pop("parallel", {})}
    return run_config(model=model, parallel=parallel, training=training, **changes)


def _train_and_save(config: RunConfig, folder: Path, saved: int, end: int) -> Curve:
    """Train to ``end``, saving after ``saved`` steps; the curve from there on."""
    grid = grid_for(config.parallel.tensor_parallel_size)
    engine = make_engine(config, grid)
    advance(engine, config, range(saved))
    CheckpointManager(folder, keep=1).save(engine, saved, {"samples": saved * 4})
    curve = advance(engine, config, range(saved, end))
    engine.close()
    return curve


def _resume(config: RunConfig, folder: Path, saved: int, end: int) -> Curve:
    grid = grid_for(config.parallel.tensor_parallel_size)
    engine = make_engine(config, grid)
    state = CheckpointManager(folder, keep=1).load(engine)
    assert state == {"samples": saved * 4}
    curve = advance(engine, config, range(saved, end))
    engine.assert_replicas_equal()
    engine.close()
    return curve


def _assert_resumes_exactly(configs: list[RunConfig], folder: Path) -> None:
    for number, config in enumerate(configs):
        place = folder / str(number)
        straight = _train_and_save(config, place, _SAVED, _END)
        resumed = _resume(config, place, _SAVED, _END)
        assert resumed.losses == straight.losses, config
        assert resumed.norms == straight.norms, config
        for name, weight in straight.weights.items():
            assert weight.equal(resumed.weights[name]), (name, config)


def test_resume_is_exact_for_every_zero_stage_and_precision_with_dropout(
    distributed: Distributed, tmp_path: Path
) -> None:
    dropout = {"model": {"dropout": 0.1}}
    configs = [_config(stage=stage, **dropout) for stage in (0, 1, 2)]
    configs += [_config(stage=s, training={"precision": "bf16"}, **dropout) for s in (1, 2, 3)]
    configs += [_config(stage=3, parallel={"offload": "parameters"}, **dropout)]
    configs += [_config(tp=2, stage=0, **dropout)]
    configs += [_config(stage=stage, optimizer={"kind": "muon"}) for stage in (0, 2)]
    configs += [_config(stage=1, optimizer={"groups": _GROUPS})]
    configs += [_config(tp=2, stage=2, model={"dropout": 0.1, **ATTENTION["olmo2"]})]
    distributed(2, _assert_resumes_exactly, configs, tmp_path)


def test_resume_is_exact_with_tensor_and_data_parallel_ranks(
    distributed: Distributed, tmp_path: Path
) -> None:
    config = _config("egpt", tp=2, model={"dropout": 0.1})
    distributed(4, _assert_resumes_exactly, [config], tmp_path)


def _train_all(configs: list[RunConfig], folder: Path, end: int) -> list[Curve]:
    return [
        _train_and_save(config, folder / str(number), _SAVED, end)
        for number, config in enumerate(configs)
    ]


def _resume_all(configs: list[RunConfig], folder: Path, end: int) -> list[Curve]:
    return [
        _resume(config, folder / str(number), _SAVED, end) for number, config in enumerate(configs)
    ]


def _assert_same_curve(ours: Curve, theirs: Curve, context: object) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4), context
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-4), context


_KINDS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "egpt": {"kind": "egpt"},
    "one_key_value_head_for_all_ranks": {"model": {"num_kv_heads": 1}},
    "two_key_value_heads_for_four_ranks": {"model": {"num_kv_heads": 2}},
    "latent": {"model": {"attention": "latent", "latent_dim": 16}},
    "egpt_with_one_key_value_head": {"kind": "egpt", "model": {"num_kv_heads": 1}},
    "qwen3": {"model": ATTENTION["qwen3"] | {"positions": "rotary", "qkv_bias": True}},
    "olmo2": {"model": ATTENTION["olmo2"] | {"positions": "rotary", "z_loss": 1e-3}},
    "muon": {"optimizer": {"kind": "muon"}},
}
# Tensor parallel, data parallel, ZeRO stage: where a run is saved, and where it goes on.
_ROUTES = {
    "gpt": [
        ((2, 2, 2), [(1, 4, 2), (1, 1, 0)]),
        ((1, 2, 2), [(2, 1, 1), (1, 2, 3)]),
        ((1, 2, 3), [(1, 1, 0), (1, 2, 2)]),
    ],
    "egpt": [((1, 2, 1), [(2, 2, 2)])],  # the whole run below goes the other way
    "one_key_value_head_for_all_ranks": [
        ((2, 2, 2), [(1, 1, 2)]),
        ((1, 2, 2), [(2, 1, 2)]),
    ],
    "two_key_value_heads_for_four_ranks": [((4, 1, 2), [(2, 2, 2)])],
    "latent": [((2, 2, 2), [(1, 4, 1)]), ((1, 2, 2), [(2, 1, 0)])],
    "qwen3": [((2, 2, 2), [(1, 1, 0)]), ((1, 2, 1), [(2, 1, 2)])],
    "olmo2": [((2, 1, 0), [(1, 2, 2)]), ((1, 2, 2), [(2, 1, 0)])],
    "muon": [((2, 1, 0), [(1, 2, 2)]), ((1, 2, 2), [(2, 1, 0), (2, 2, 1)])],
}


def _at(kind: str, topology: tuple[int, int, int]) -> RunConfig:
    tp, dp, stage = topology
    training = {"micro_batch_size": 4 // dp}
    return _config(**_KINDS[kind], tp=tp, stage=stage, training=training)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("gpt", "egpt") else pytest.param(kind, marks=pytest.mark.long)
        for kind in _ROUTES
    ],
)
def test_a_run_goes_on_at_another_topology_as_if_undisturbed(
    distributed: Distributed, tmp_path: Path, kind: str
) -> None:
    end = _SAVED + 20
    for number, (saved, others) in enumerate(_ROUTES[kind]):
        folder = tmp_path / str(number)
        ranks = saved[0] * saved[1]
        undisturbed = distributed(ranks, _train_and_save, _at(kind, saved), folder, _SAVED, end)[0]
        for other in others:
            ranks = other[0] * other[1]
            resumed = distributed(ranks, _resume, _at(kind, other), folder, _SAVED, end)[0]
            _assert_same_curve(resumed, undisturbed, f"{kind}: {saved} -> {other}")


def _resume_each(config: RunConfig, folders: list[Path], end: int) -> list[Curve]:
    """One engine for all: what it loads must leave nothing of what was there before."""
    engine = make_engine(config, grid_for(config.parallel.tensor_parallel_size))
    curves = []
    for folder in folders:
        CheckpointManager(folder, keep=1).load(engine)
        curves.append(advance(engine, config, range(_SAVED, end)))
        engine.assert_replicas_equal()
    engine.close()
    return curves


def _assert_all_pairs_go_on(
    distributed: Distributed,
    folder: Path,
    kind: str,
    saved: list[tuple[int, int, int]],
    others: list[tuple[int, int, int]],
) -> None:
    """From each of ``saved`` to each of ``others``: one run, wherever it was and goes on."""
    folders, curves = [], []
    for number, topology in enumerate(saved):
        folders.append(folder / str(number))
        ranks = topology[0] * topology[1]
        curve = distributed(
            ranks, _train_and_save, _at(kind, topology), folders[-1], _SAVED, _END, timeout=600
        )
        curves.append(curve[0])
        _assert_same_curve(curves[-1], curves[0], f"{kind}: {topology} and {saved[0]}")
    for other in others:
        ranks = other[0] * other[1]
        resumed = distributed(ranks, _resume_each, _at(kind, other), folders, _END, timeout=600)[0]
        for topology, curve in zip(saved, resumed, strict=True):
            _assert_same_curve(curve, curves[0], f"{kind}: {topology} -> {other}")


@pytest.mark.parametrize(
    ("kind", "saved", "others"),
    [
        ("one_key_value_head_for_all_ranks", [(2, 1, 0)], [(1, 1, 0), (1, 2, 2)]),
        ("two_key_value_heads_for_four_ranks", [(4, 1, 0)], [(2, 1, 0)]),
        ("two_key_value_heads_for_four_ranks", [(2, 1, 0)], [(4, 1, 2)]),
        ("egpt_with_one_key_value_head", [(2, 1, 0)], [(1, 1, 1)]),
    ],
)
def test_shared_heads_saved_without_zero_go_on_where_they_are_cut_or_merged(
    distributed: Distributed,
    tmp_path: Path,
    kind: str,
    saved: list[tuple[int, int, int]],
    others: list[tuple[int, int, int]],
) -> None:
    _assert_all_pairs_go_on(distributed, tmp_path, kind, saved, others)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["two_key_value_heads_for_four_ranks", "egpt_with_one_key_value_head"]
)
def test_every_pair_of_topologies_and_zero_stages_goes_on(
    distributed: Distributed, tmp_path: Path, kind: str
) -> None:
    grids = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
    if kind == "two_key_value_heads_for_four_ranks":  # which differs in how four ranks have them
        grids = [(1, 2), (2, 2), (4, 1)]
    topologies = [(tp, dp, stage) for tp, dp in grids for stage in (0, 1, 2)]
    topologies += [(1, 4, 3), (2, 2, 3)]
    _assert_all_pairs_go_on(distributed, tmp_path, kind, topologies, topologies)


def _whole_run(config: RunConfig, resume: bool, stop_after: int) -> None:
    grid = grid_for(config.parallel.tensor_parallel_size)
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, grid, resume=resume, stops=tiny.StopAfter(stop_after))


def test_a_whole_run_is_resumed_at_another_topology_by_nothing_but_resume(
    distributed: Distributed, corpus: Path, tmp_path: Path
) -> None:
    """Data, features, schedule and evaluation go on too, and the losses are recorded once."""

    def config(folder: str, tp: int) -> RunConfig:
        return tiny.run_config(
            "egpt",
            corpus,
            tmp_path / folder,
            model={"dropout": 0.0},
            parallel={"tensor_parallel_size": tp},
            training={"steps": 24, "eval_interval": 12, "micro_batch_size": 1},
            checkpoint={"interval": 0},
        )

    distributed(4, _whole_run, config("straight", 2), False, 24)
    distributed(4, _whole_run, config("moved", 2), False, 4)
    distributed(2, _whole_run, config("moved", 1), True, 24)
    for curve in (tiny.losses, tiny.validation_losses):
        straight, moved = curve(tmp_path / "straight"), curve(tmp_path / "moved")
        assert moved == pytest.approx(straight, rel=1e-4)
        assert max(moved) == 24


def test_checkpoints_of_other_stages_and_precisions_are_reshaped(
    distributed: Distributed, tmp_path: Path
) -> None:
    bf16 = {"training": {"precision": "bf16"}}
    saved = [_config(tp=2, stage=0), _config(stage=1, **bf16)]
    straight = distributed(2, _train_all, saved, tmp_path, _END)[0]
    resumed = distributed(1, _resume_all, [_config(), _config(**bf16)], tmp_path, _END)[0]
    _assert_same_curve(resumed[0], straight[0], "stage 0, TP 2")
    # bf16 rounds differently at another data-parallel size
    assert resumed[1].losses == pytest.approx(straight[1].losses, rel=1e-3)


def _error_of(config: RunConfig, folder: Path) -> str:
    """What loading raises, the same on every rank but for which rank it names."""
    engine = make_engine(config, grid_for(config.parallel.tensor_parallel_size))
    try:
        CheckpointManager(folder, keep=1).load(engine)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    raise AssertionError("the checkpoint was loaded")


def test_what_does_not_fit_is_refused_by_name_on_every_rank(
    distributed: Distributed, tmp_path: Path
) -> None:
    distributed(2, _train_all, [_config()], tmp_path, _SAVED)
    folder = tmp_path / "0"

    errors = distributed(2, _error_of, _config(training={"precision": "bf16"}), folder)
    assert all("fp32" in error and "bf16" in error for error in errors)

    errors = distributed(2, _error_of, _config(model={"num_layers": 3}), folder)
    assert all("stack.blocks.2" in error for error in errors)

    [optimizer] = folder.glob("step_*/deepspeed/zero_pp_rank_1_*")
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    errors = distributed(2, _error_of, _config(), folder)
    assert all(optimizer.name in error and "damaged" in error for error in errors)

    optimizer.unlink()
    errors = distributed(2, _error_of, _config(), folder)
    assert all(optimizer.name in error and "missing" in error for error in errors)


def _resume_with_other_settings(folder: Path) -> None:
    changed = {"optimizer": {"weight_decay": 0.3, "beta2": 0.9}}
    for tp in (1, 2):  # as it is, and reshaped
        for stage in (0, 2):
            config = _config(tp=tp, stage=stage, training={"gradient_clipping": 0.5}, **changed)
            engine = make_engine(config, grid_for(tp))
            CheckpointManager(folder, keep=1).load(engine)
            matrices, vectors = engine.optimizer.param_groups
            assert matrices["weight_decay"] == 0.3
            assert vectors["weight_decay"] == 0.0
            assert matrices["betas"] == (0.9, 0.9)
            if stage == 2:
                assert engine.optimizer.clip_grad == 0.5
            engine.close()


def test_settings_of_this_run_win_over_the_checkpoints(
    distributed: Distributed, tmp_path: Path
) -> None:
    distributed(2, _train_all, [_config()], tmp_path, _SAVED)
    distributed(2, _resume_with_other_settings, tmp_path / "0")


def _one_rank_cannot_read(folder: Path) -> list[str]:
    """What each way of loading raises on this rank."""
    engine, errors = make_engine(_config(), grid_for(1)), []
    engine.train_step(0, micro_batches(0, _config(), engine.grid))
    engine.save_state(folder / "state")
    dist.barrier()

    def unreadable(path: str, **_: object) -> None:
        raise OSError("this disk is lost")

    with pytest.MonkeyPatch.context() as patch:
        if not engine.grid.is_main:
            patch.setattr(torch, "load", unreadable)
        for load in (
            lambda: engine.load_state(folder / "state"),
            lambda: engine.load_reshaped(folder / "state", engine.topology, folder / "scratch"),
        ):
            with pytest.raises(CheckpointError) as raised:
                load()
            errors.append(str(raised.value))
    engine.close()
    return errors


def test_what_one_rank_cannot_read_is_told_on_every_rank_at_once(
    distributed: Distributed, tmp_path: Path
) -> None:
    """None is left behind to wait for a rank that has gone."""
    told = distributed(2, _one_rank_cannot_read, tmp_path)
    assert all(error.endswith("this disk is lost") for errors in told for error in errors)
    assert all(error.startswith("rank 1: ") for error in told[0])


class _Payload:
    """Unpickling this would run code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def _load_foreign_pickle(folder: Path) -> None:
    config = _config()
    engine = make_engine(config, grid_for(1))
    engine.save_state(folder / "state")
    mark = folder / "executed"
    for file in (folder / "state").iterdir():
        original = file.read_bytes()
        torch.save({"module": _Payload(mark)}, file)
        torch.load(file, weights_only=False)
        assert mark.exists(), "the payload must work where objects are unpickled"
        mark.unlink()
        for load in (
            lambda: engine.load_state(folder / "state"),
            lambda: engine.load_reshaped(folder / "state", engine.topology, folder / "scratch"),
        ):
            with pytest.raises(CheckpointError, match="cannot be loaded"):
                load()
            assert not mark.exists()
            shutil.rmtree(folder / "scratch", ignore_errors=True)
        file.write_bytes(original)
    engine.load_state(folder / "state")
    engine.close()


def test_no_object_is_unpickled_from_a_checkpoint(distributed: Distributed, tmp_path: Path) -> None:
    distributed(1, _load_foreign_pickle, tmp_path)


def _write_once_the_other_has_left_deepspeed(folder: Path, stage: int) -> bool:
    """Whether it has left in time."""
    engine = make_engine(_config(stage=stage), grid_for(1))
    save_checkpoint, write = DeepSpeedEngine.save_checkpoint, torch.save
    has_left, in_time = folder / "has_left", True

    def save_and_tell(*args: Any, **options: Any) -> None:
        save_checkpoint(*args, **options)
        if not engine.grid.is_main:
            has_left.touch()

    def write_late(*args: Any) -> None:
        nonlocal in_time
        deadline = time.monotonic() + 5
        while engine.grid.is_main and not has_left.exists() and in_time:
            time.sleep(0.005)
            in_time = time.monotonic() < deadline
        write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", write_late)
        patch.setattr(DeepSpeedEngine, "save_checkpoint", save_and_tell)
        CheckpointManager(folder, keep=1).save(engine, 1, {})
    engine.close()
    return in_time


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_that_writes_long_keeps_no_other_in_a_collective_of_the_step(
    distributed: Distributed, tmp_path: Path, stage: int
) -> None:
    """It waits ten minutes, and a file system may take longer for a model's file."""
    assert all(distributed(2, _write_once_the_other_has_left_deepspeed, tmp_path, stage))


def _save_with_a_full_disk_on_one_rank(folder: Path, later: bool) -> str:
    config = _config()
    grid = grid_for(1)
    engine = make_engine(config, grid)
    manager = CheckpointManager(folder, keep=1)
    manager.save(engine, 1, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if grid.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        if later:
            manager.save_later(engine, 2, {})
            manager.finish()
        else:
            manager.save(engine, 2, {})
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        manager.load(engine)
        engine.close()
    raise AssertionError("saving worked")


@pytest.mark.parametrize("later", [False, True], ids=["waiting", "beside_training"])
def test_a_full_disk_is_reported_on_every_rank_and_harms_no_earlier_checkpoint(
    distributed: Distributed, tmp_path: Path, later: bool
) -> None:
    for error in distributed(2, _save_with_a_full_disk_on_one_rank, tmp_path, later):
        assert "step 2 was not saved" in error
        assert "zero_pp_rank_1" in error
        assert "File too large" in error
        assert "step_00000001 is untouched" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
