"""ZeRO stage 3: parameters are cut over the ranks, and no number changes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from safetensors.torch import load_file

from megaegpt.config import EGPTConfig, LoRAConfig
from megaegpt.config.run import RunConfig
from megaegpt.generation.generator import sample_text
from megaegpt.model.build import build_model
from megaegpt.parallel.params import full_state
from megaegpt.training.checkpoint.exported_weights import exported_weights
from megaegpt.training.checkpoint.folders import find_checkpoint
from megaegpt.training.checkpoint.reshaping import reshape
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny import runs
from tests.tiny.engines import (
    Curve,
    largest_difference,
    make_engine,
    micro_batches,
    nats,
    run_config,
    train_plainly,
)
from tests.tiny.runs import corpus

__all__ = ["corpus"]

_STEPS = 10
_LLAMA = {"norm": "rms_norm", "mlp": "swiglu", "bias": False, "positions": "rotary"}
_MEMORY = {"token_memory": True, "memory_dim": 8, "memory_pointers": 2}
_EXTENDED = {"local_attention": True, "memory_gate": True}
_RESIDUAL = {"adapter_residual": True, "attention_sink": True}
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


def _export(folder: Path) -> bool:
    config = _config("gpt2", zero_stage=3)
    config = dataclasses.replace(
        config, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    )
    engine, grid = make_engine(config, grid_for(1)), grid_for(1)
    data = mock.Mock()
    data.tokenizer.is_installed, data.tokenizer.fingerprint = True, "some"
    data.save_beside.return_value = {}
    copies = mock.Mock()
    for given in (copies, None):
        write = exported_weights(config, engine.model, grid, data, None, None, given)
        write(folder / str(given is None))
    return copies.of.called


def test_no_gathered_weight_is_kept_until_a_checkpoint_is_written(
    distributed: Distributed, tmp_path: Path
) -> None:
    """A copy beside training holds on to what it was made of: here, that would be the model."""
    (held,) = distributed(1, _export, tmp_path)
    assert not held
    beside, waiting = (
        load_file(tmp_path / name / "model.safetensors") for name in ("False", "True")
    )
    assert beside.keys() == waiting.keys()
    assert all(value.equal(waiting[name]) for name, value in beside.items())


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


def _evaluated_first() -> tuple[float, float]:
    """Before a step of training, and by the whole model."""
    config, grid = _config("egpt_memory"), grid_for(1)
    (batch, *_) = micro_batches(0, config, grid)
    models = [make_engine(config, grid).model, build_model(config.model, grid, seed=3)]
    with torch.no_grad():
        first, whole = (nats(model.eval(), batch).item() for model in models)
    return first, whole


def test_a_token_memory_can_be_evaluated_before_it_is_trained(distributed: Distributed) -> None:
    for first, whole in distributed(2, _evaluated_first):
        assert first == pytest.approx(whole, rel=1e-6)


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


def _whole_run(config: RunConfig) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pretrain(config, grid_for(1), sample_text=sample_text)


def test_an_evaluation_has_the_same_loss_where_a_rank_has_fewer_windows(
    distributed: Distributed, corpus: Path, tmp_path: Path
) -> None:
    """Each pass gathers parameters on all ranks; one of two has a batch less, and none hangs."""
    small_too = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for stage in (2, 3):
        config = runs.run_config(
            "gpt",
            corpus,
            tmp_path / str(stage),
            parallel={"zero_stage": stage},
            training={"steps": 3, "eval_interval": 3, "micro_batch_size": 4},
            generation={"prompt": "!", "max_new_tokens": 2},
        )
        windows = -(-(runs.VALIDATION_TOKENS - 1) // config.model.sample_len)
        batches = -(-windows // config.training.micro_batch_size)
        assert batches % 2 == 1
        raw = small_too if stage == 3 else {}
        distributed(2, _whole_run, dataclasses.replace(config, deepspeed=raw))
    second, third = (runs.validation_losses(tmp_path / str(stage)) for stage in (2, 3))
    assert list(third) == [3]
    assert third == pytest.approx(second, rel=1e-6)


def test_selective_checkpointing_changes_no_loss_behind_evaluations(
    distributed: Distributed, corpus: Path, tmp_path: Path
) -> None:
    """How many gathers run in a block changes with each of them."""
    losses = []
    for kind in ("none", "selective"):
        training = {"steps": 4, "eval_interval": 2, "activation_checkpointing": kind}
        config = _checkpointed(corpus, tmp_path / kind, training)
        distributed(2, _whole_run, config)
        losses.append(runs.losses(tmp_path / kind))
    assert losses[0] == losses[1]


def test_selective_checkpointing_changes_no_loss_of_adapters(
    distributed: Distributed, corpus: Path, tmp_path: Path
) -> None:
    """Beside them, the frozen weights are gathered anew in the backward pass."""
    base = _checkpointed(corpus, tmp_path / "base", {"steps": 3})
    distributed(2, _whole_run, base)
    losses = []
    for kind in ("none", "selective"):
        training = {
            "steps": 3,
            "activation_checkpointing": kind,
            "initialize_from": str(tmp_path / "base"),
            "lora": LoRAConfig(rank=2),
        }
        distributed(2, _whole_run, _checkpointed(corpus, tmp_path / kind, training))
        losses.append(runs.losses(tmp_path / kind))
    assert losses[0] == losses[1]


def _checkpointed(corpus: Path, folder: Path, training: dict[str, Any]) -> RunConfig:
    small_too = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    config = runs.run_config(
        "gpt",
        corpus,
        folder,
        parallel={"zero_stage": 3},
        training=training,
        generation={"prompt": "!", "max_new_tokens": 2},
    )
    return dataclasses.replace(config, deepspeed=small_too)


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


def _cut_again(config: RunConfig, folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, grid_for(1), stops=runs.StopAfter(3))
        reshape(find_checkpoint(folder / "checkpoints"), folder / "again", grid_for(1))
        checkpoint = dataclasses.replace(config.checkpoint, directory=str(folder / "again"))
        pretrain(dataclasses.replace(config, checkpoint=checkpoint), grid_for(1), resume=True)


@pytest.mark.long
def test_a_reshaped_checkpoint_has_the_runs_own_groups_of_optimizer_states(
    distributed: Distributed, corpus: Path, tmp_path: Path
) -> None:
    config = runs.run_config("gpt", corpus, tmp_path, parallel={"zero_stage": 3})
    groups = {"zero_optimization": {"sub_group_size": 1000}}
    distributed(2, _cut_again, dataclasses.replace(config, deepspeed=groups), tmp_path)
    assert list(runs.losses(tmp_path)) == [1, 2, 3, 4, 5, 6]
