"""Frozen parts: no gradient, no optimizer state, the same bits after training and resuming."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.errors import ConfigError
from megaegpt.model.build import build_model, meta_model
from megaegpt.model.parts import freeze, part_of, parts_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import StopAfter, corpus, encoder_config, losses, run_config

__all__ = ["corpus"]

FROZEN = ("embeddings", "layers:0")


@pytest.mark.parametrize("kind", ["gpt", "egpt", "deepgpt"])
def test_every_parameter_has_a_part_and_layers_have_their_number(kind: str) -> None:
    model = meta_model(encoder_config(kind=kind, tied_embeddings=False))
    before, after = {
        "gpt": (["embeddings"], ["norm", "head"]),
        "egpt": (["input_mlp", "embeddings"], ["norm", "head"]),
        "deepgpt": ([], ["norm", "head"]),
    }[kind]
    assert parts_of(model) == [*before, "layers:0", "layers:1", *after]
    assert part_of("stack.blocks.11.mlp.up.weight") == "layers:11"


def test_freezing_leaves_the_rest_to_train() -> None:
    model = build_model(encoder_config(), ProcessGrid())
    count = freeze(model, ("layers:0-1", "norm"))
    trained = {part_of(n) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"embeddings"}
    assert count == sum(p.numel() for p in model.parameters() if not p.requires_grad) > 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("head",), "no head of its own; it has embeddings, layers:0, layers:1, norm"),
        (("attention",), "no attention of its own"),
        (("embeddings", "layers:0-1", "norm"), "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_said(parts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze(build_model(encoder_config(), ProcessGrid()), parts)


def _config(corpus: Path, folder: Path, tp: int, stage: int = 2, seed: int = 1337) -> RunConfig:
    return run_config(
        "gpt",
        corpus,
        folder,
        parallel={"tensor_parallel_size": tp, "zero_stage": stage},
        training={"steps": 6, "freeze": FROZEN, "eval_interval": 100, "seed": seed},
        data={"validation": ()},
        checkpoint={"interval": 0},
        model={"dropout": 0.0},
    )


def _run(config: RunConfig, resume: bool = False, stop_after: int = 99) -> None:
    grid = grid_for(config.parallel.tensor_parallel_size)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pretrain(config, grid, resume=resume, stops=StopAfter(stop_after))


def _straight_resumed_and_reshaped(corpus: Path, folder: Path) -> None:
    _run(_config(corpus, folder / "straight", 1))
    _run(_config(corpus, folder / "resumed", 1), stop_after=3)
    _run(_config(corpus, folder / "resumed", 1), resume=True)
    _run(_config(corpus, folder / "reshaped", 2), stop_after=3)
    _run(_config(corpus, folder / "reshaped", 1), resume=True)
    _run(_config(corpus, folder / "replicated", 2, stage=0), stop_after=3)
    _run(_config(corpus, folder / "replicated", 1, stage=0), resume=True)
    _run(_config(corpus, folder / "from elsewhere", 1), stop_after=1)
    _run(_config(corpus, folder / "from elsewhere", 1, seed=7), resume=True)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_00000006" / "weights" / "model.safetensors")


def _moments(folder: Path) -> int:
    """Elements of Adam's first moment over all ranks."""
    files = (folder / "checkpoints" / "step_00000006" / "deepspeed").glob("*zero_pp_rank*")
    total = 0
    for file in files:
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]
        groups = state["base_optimizer_state"]["state"].values()
        total += sum(group["exp_avg"].numel() for group in groups)
    return total


def test_frozen_parts_keep_their_bits_through_resuming_and_another_topology(
    corpus: Path, tmp_path: Path, distributed: Distributed
) -> None:
    distributed(2, _straight_resumed_and_reshaped, corpus, tmp_path)
    model: ModelConfig = _config(corpus, tmp_path, 1).model
    start = dict(build_model(model, ProcessGrid(), seed=1337).named_parameters())
    trainable = sum(p.numel() for n, p in start.items() if part_of(n) not in FROZEN)
    for run in ("straight", "resumed", "reshaped", "replicated", "from elsewhere"):
        for name, tensor in _weights(tmp_path / run).items():
            assert torch.equal(tensor, start[name]) == (part_of(name) in FROZEN), (run, name)
        if run != "from elsewhere":
            assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    straight, resumed = _weights(tmp_path / "straight"), _weights(tmp_path / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    padding = 8  # DeepSpeed rounds each of the two groups up
    assert trainable <= _moments(tmp_path / "straight") <= trainable + padding
