"""Whole runs on a toy corpus, small enough for many of them: configuration, data, encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaegpt.config import (
    CheckpointConfig,
    DataConfig,
    EGPTConfig,
    EncoderConfig,
    GenerationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megaegpt.config.run import RunConfig
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.pretraining import pretrain
from megaegpt.training.stopping import StopRequests

VOCAB, HIDDEN, CHUNK, CHUNKS = 100, 16, 8, 3
TRAIN_TOKENS, VALIDATION_TOKENS = 1000, 213  # the validation split ends inside a chunk


def write_corpus(folder: Path, seed: int = 0) -> None:
    """Shards ``train`` and ``validation`` of a sequence with some structure to learn."""
    rng = np.random.default_rng(seed)
    for split, length in (("train", TRAIN_TOKENS), ("validation", VALIDATION_TOKENS)):
        steps = rng.integers(0, 5, length)
        with ShardWriter(folder / split) as writer:
            writer.add_document((np.cumsum(steps) % VOCAB).astype(np.uint16))
            writer.finish()


def encoder_config(**changes: Any) -> ModelConfig:
    """A GPT that fits under :func:`run_config`'s decoders."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_seq_len": CHUNK,
        "hidden_size": HIDDEN,
        "num_layers": 2,
        "num_heads": 4,
    }
    return ModelConfig(**values | changes)


def write_encoder(folder: Path, seed: int = 7) -> None:
    """Weights of an untrained encoder."""
    grid = ProcessGrid()
    save_weights(build_model(encoder_config(), grid, seed=seed), folder, grid)


def run_config(kind: str, corpus: Path, folder: Path, **changes: Any) -> RunConfig:
    """A run of 6 steps in ``folder``, changed as in ``training={"steps": 3}``.

    ``corpus`` holds the shards and, for egpt and deepgpt, ``encoder``.
    """
    sections: dict[str, Any] = {
        "model": encoder_config(
            kind=kind,
            dropout=0.1,
            tied_embeddings=kind == "gpt",
            egpt=EGPTConfig(num_chunks=CHUNKS, chunk_size=CHUNK),
            encoder=EncoderConfig(
                source=None if kind == "gpt" else str(corpus / "encoder"), batch_size=4
            ),
        ),
        "data": DataConfig(
            train=(str(corpus / "train"),), validation=(str(corpus / "validation"),)
        ),
        "parallel": ParallelConfig(),
        "training": TrainingConfig(
            steps=6, global_batch_size=8, micro_batch_size=2, eval_interval=3
        ),
        "optimizer": OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=2),
        "checkpoint": CheckpointConfig(directory=str(folder / "checkpoints"), interval=3),
        "logging": LoggingConfig(directory=str(folder), interval=2, tensorboard=False),
        "generation": GenerationConfig(),
    }
    for name, values in changes.items():
        sections[name] = dataclasses.replace(sections[name], **values)
    return RunConfig(**sections)


class StopAfter(StopRequests):
    """Asks to stop before the step after ``steps`` more."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def answer(self) -> tuple[bool, str | None]:
        some_failed, reason = super().answer()
        self.left -= 1
        return some_failed, "the test" if self.left < 0 else reason


def pretrain_quietly(config: RunConfig, grid: ProcessGrid, stop: int | None = None) -> None:
    """A whole run; with ``stop`` it is stopped after so many steps, and gone on with."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if stop is not None:
            assert not pretrain(config, grid, stops=StopAfter(stop))
        assert pretrain(config, grid, resume=stop is not None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of shards and an encoder."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    write_encoder(folder / "encoder")
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """A run's ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; a step recorded twice is an error."""
    found: dict[int, float] = {}
    for record in records(folder):
        if "loss" in record:
            assert record["step"] not in found
            found[record["step"]] = record["loss"]
    return found


def validation_losses(folder: Path) -> dict[int, float]:
    """Validation loss by step."""
    return {r["step"]: r["validation_loss"] for r in records(folder) if "validation_loss" in r}
