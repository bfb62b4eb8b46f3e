"""Runs that train adapters beside frozen weights: exact to resume, small to save, ready to use."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megaegpt.config import DataConfig, LoRAConfig, ModelConfig
from megaegpt.config.data import InstructionConfig
from megaegpt.config.run import RunConfig
from megaegpt.config.validation import find_problems
from megaegpt.errors import CheckpointError
from megaegpt.generation.generator import sample_text
from megaegpt.generation.trained import load_for_inference
from megaegpt.interop.merging import merge_adapter
from megaegpt.model.adapter_files import read_adapter
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import (
    find_weights,
    load_weights,
    read_weights_config,
    save_weights,
)
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.memory import estimate_memory
from megaegpt.training.checkpoint.folders import find_checkpoint
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.checkpoint.masters import export_masters
from megaegpt.training.checkpoint.reshaping import reshape
from megaegpt.training.finetuning import finetune
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, corpus, encoder_config, losses, run_config

__all__ = ["corpus"]

GRID = ProcessGrid()
LORA = LoRAConfig(rank=2, alpha=8.0, dropout=0.1)


def adapter_run(corpus: Path, folder: Path, kind: str = "gpt", **changes: Any) -> RunConfig:
    """Over the encoder of the corpus as its base, or over an untrained EGPT."""
    base = corpus / ("encoder" if kind == "gpt" else "egpt")
    training = {"lora": LORA, "initialize_from": str(base)} | changes.pop("training", {})
    return run_config(kind, corpus, folder, training=training, **changes)


def train(config: RunConfig, *stop_after: int) -> str:
    """From the start, or from where it was stopped, for so many steps."""
    shown = io.StringIO()
    grid = grid_for(config.parallel.tensor_parallel_size)
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        for steps in stop_after:
            pretrain(config, grid, stops=StopAfter(steps))
        pretrain(config, grid, resume=bool(stop_after))
    return shown.getvalue()


def stop_and_cut_otherwise(config: RunConfig, steps: int, tp_size: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, grid_for(config.parallel.tensor_parallel_size), stops=StopAfter(steps))
        parallel = dataclasses.replace(config.parallel, tensor_parallel_size=tp_size)
        config = dataclasses.replace(config, parallel=parallel)
        pretrain(config, grid_for(tp_size), resume=True)


def cut_in_two(checkpoint: Path, output: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        reshape(checkpoint, output, grid_for(2))


@pytest.mark.parametrize(
    ("tp_size", "stage", "precision"),
    [
        (2, 2, "bf16"),
        pytest.param(2, 0, "fp32", marks=pytest.mark.long),
        pytest.param(1, 1, "bf16", marks=pytest.mark.long),
        pytest.param(1, 3, "bf16", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tp_size: int,
    stage: int,
    precision: str,
    corpus: Path,
    tmp_path: Path,
    distributed: Distributed,
) -> None:
    runs = [
        adapter_run(
            corpus,
            tmp_path / name,
            training={"precision": precision},
            parallel={"tensor_parallel_size": tp_size, "zero_stage": stage},
        )
        for name in ("straight", "interrupted")
    ]
    if stage == 3:  # at which all of so small a model would stay whole
        zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        runs = [dataclasses.replace(run, deepspeed=zero) for run in runs]
    distributed(2, train, runs[0])
    distributed(2, train, runs[1], 4)
    assert losses(tmp_path / "straight") == losses(tmp_path / "interrupted")
    saved = [
        (find_weights(tmp_path / name) / "adapter.safetensors")
        for name in ("straight", "interrupted")
    ]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_masters_of_adapters_are_an_adapter_in_fp32(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    run = adapter_run(corpus, tmp_path / "run", training={"precision": "bf16", "steps": 3})
    distributed(1, train, run)
    export_masters(find_checkpoint(tmp_path / "run"), tmp_path / "masters")
    saved = load_file(find_weights(tmp_path / "run") / "adapter.safetensors")
    precise = load_file(tmp_path / "masters" / "adapter.safetensors")
    assert saved.keys() == precise.keys()
    for name, value in precise.items():
        assert value.dtype == torch.float32
        assert value.to(saved[name].dtype).equal(saved[name]), name
    assert any(not value.equal(saved[name].float()) for name, value in precise.items())
    merge_adapter(tmp_path / "masters", corpus / "encoder", tmp_path / "merged")
    assert read_weights_config(tmp_path / "merged")[0] == read_adapter(tmp_path / "masters").config


def test_a_run_at_zero_stage_3_goes_on_behind_the_first_save_of_its_second_life(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    """Adapters are used outside of their own modules' passes, and are small: they stay whole."""
    runs = [
        adapter_run(
            corpus,
            tmp_path / str(stage),
            training={"steps": 9, "eval_interval": 100},
            parallel={"zero_stage": stage},
        )
        for stage in (2, 3)
    ]
    distributed(1, train, runs[0])
    distributed(1, train, runs[1], 1)
    expected = losses(tmp_path / "2")
    assert losses(tmp_path / "3") == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_holds_adapters_alone_and_goes_on_at_another_topology(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    straight = adapter_run(
        corpus,
        tmp_path / "straight",
        training={"lora": dataclasses.replace(LORA, dropout=0.0)},
        model={"dropout": 0.0},
    )
    distributed(2, train, straight)
    cut = adapter_run(
        corpus,
        tmp_path / "cut",
        training={"lora": straight.training.lora},
        model={"dropout": 0.0},
        parallel={"tensor_parallel_size": 2},
    )
    distributed(2, stop_and_cut_otherwise, cut, 4, 1)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    weights = find_weights(tmp_path / "cut")
    assert not (weights / "model.safetensors").exists()
    with safe_open(weights / "adapter.safetensors", framework="pt") as file:
        assert all(".lora." in name for name in file.keys())  # noqa: SIM118, no mapping
    assert all(".lora." in name for name in Manifest.read(weights.parent).parameters)
    for file_of_rank in (weights.parent / "deepspeed").glob("mp_rank_*"):
        module = torch.load(file_of_rank, weights_only=False)["module"]
        assert module.keys() == Manifest.read(weights.parent).parameters.keys()
    assert read_adapter(weights).lora == straight.training.lora
    distributed(2, cut_in_two, weights.parent, tmp_path / "reshaped")
    reshaped = find_weights(tmp_path / "reshaped")
    assert Manifest.read(reshaped.parent).topology["tensor_parallel"] == 2
    assert (reshaped / "adapter.safetensors").read_bytes() == (
        weights / "adapter.safetensors"
    ).read_bytes()


def test_resuming_over_another_base_or_with_other_adapters_is_refused(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    config = adapter_run(corpus, tmp_path, training={"steps": 3})
    (shown,) = distributed(1, train, config)
    assert "frozen (under adapters of rank 2)" in shown
    save_weights(build_model(encoder_config(), GRID, seed=99), tmp_path / "other", GRID)
    other = {"initialize_from": str(tmp_path / "other")}
    for changes, message in (
        (other, "trained beside other weights"),
        ({"lora": dataclasses.replace(LORA, alpha=4.0)}, r"lora\.alpha is 8\.0 there"),
        ({"lora": LoRAConfig()}, r"lora\.rank is 2 there and null here"),
    ):
        training = dataclasses.replace(config.training, steps=5, **changes)
        with pytest.raises(CheckpointError, match=message):
            resume_here(dataclasses.replace(config, training=training))


def resume_here(config: RunConfig) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, GRID, resume=True)


def test_an_egpt_decoder_learns_adapters_over_its_encoder(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    encoder = build_model(encoder_config(), GRID)
    load_weights(encoder, corpus / "encoder", GRID)
    config = adapter_run(corpus, tmp_path / "run", "egpt", training={"steps": 3})
    folder = tmp_path / "egpt"
    extra = {"encoder_fingerprint": FrozenEncoder(encoder).fingerprint}  # type: ignore[arg-type]
    save_weights(build_model(config.model, GRID, seed=3), folder, GRID, extra)
    training = dataclasses.replace(config.training, initialize_from=str(folder))
    distributed(2, train, dataclasses.replace(config, training=training))
    adapter = read_adapter(find_weights(tmp_path / "run"))
    assert adapter.config.kind == "egpt"
    assert len(losses(tmp_path / "run")) > 0


# -- on conversations ------------------------------------------------------------------------------


def tune(config: RunConfig) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        finetune(config, grid_for(1), sample_text=sample_text)
    return shown.getvalue()


def test_conversations_are_tuned_on_and_their_template_goes_with_the_run(
    tmp_path: Path, distributed: Distributed
) -> None:
    gpt = ModelConfig(max_seq_len=64, hidden_size=16, num_layers=1, num_heads=2)
    save_weights(build_model(gpt, GRID, seed=1), tmp_path / "base", GRID)
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Say {word}."},
                {"role": "assistant", "content": word},
            ]
        }
        for word in ("yes", "no", "red", "blue", "green")
    ]
    silent = {"conversations": [{"from": "human", "value": "Hello?"}]}
    lines = map(json.dumps, [*chats, silent])
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    config = run_config("gpt", tmp_path, tmp_path / "run")
    instructions = InstructionConfig(
        train=(str(tmp_path / "chats.jsonl"),), held_out=0.2, packing=True, template="chatml"
    )
    config = dataclasses.replace(
        config,
        model=ModelConfig(),
        data=DataConfig(instructions=instructions),
        training=dataclasses.replace(
            config.training, initialize_from=str(tmp_path / "base"), lora=LORA
        ),
        generation=dataclasses.replace(config.generation, prompt="Say yes.", max_new_tokens=2),
    )
    (shown,) = distributed(1, tune, config)
    assert "in the chat template chatml; 1 without anything to learn left out" in shown
    assert "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n" in shown
    loaded = load_for_inference(tmp_path / "run", GRID)
    assert loaded.asked_in_chats
    assert loaded.chat_template is not None
    assert "<|im_start|>" in loaded.chat_template.source
    merge_adapter(find_weights(tmp_path / "run"), tmp_path / "base", tmp_path / "merged")
    merged = load_for_inference(tmp_path / "merged", GRID)
    assert merged.asked_in_chats
    base = load_for_inference(tmp_path / "base", GRID).model
    for (name, ours), before, again in zip(
        loaded.model.named_parameters(), base.parameters(), merged.model.parameters(), strict=True
    ):
        assert torch.equal(ours, again), name
        is_adapted = name.endswith("weight") and ("attention." in name or "mlp." in name)
        assert torch.equal(ours, before) != is_adapted, name


# -- configuration and planning --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initialize_from": None}, "needs training.initialize_from"),
        ({"freeze": ("norm",)}, "is for training without adapters"),
        ({"lora": LoRAConfig(alpha=3.0)}, "has no effect without training.lora.rank"),
        ({"lora": LoRAConfig(rank=1, targets=("q_proj",))}, "'q_proj' is none of attention, mlp"),
        ({"lora": LoRAConfig(rank=1, targets=())}, "targets is empty"),
    ],
)
def test_adapters_that_cannot_be_trained_are_named(
    changes: dict[str, Any], message: str, corpus: Path, tmp_path: Path
) -> None:
    config = adapter_run(corpus, tmp_path, training=changes)
    assert any(message in problem.message for problem in find_problems(config))


def test_the_plan_knows_that_frozen_weights_have_no_gradients(corpus: Path, tmp_path: Path) -> None:
    adapters = adapter_run(corpus, tmp_path)
    training = dataclasses.replace(adapters.training, lora=LoRAConfig())
    with_lora, full = (
        estimate_memory(config, 1, "fp32", device_type="cpu")
        for config in (adapters, dataclasses.replace(adapters, training=training))
    )
    assert with_lora.frozen == full.weights
    trained = with_lora.weights / 4
    assert trained == 2 * 2 * (4 * (16 + 16) + (16 + 64) * 2)  # layers x rank x (in + out)
    assert with_lora.optimizer + with_lora.gradients < 0.3 * (full.optimizer + full.gradients)
