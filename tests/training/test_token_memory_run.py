"""Runs of an EGPT with a token memory: any ranks, stored or online, stopped or not."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest

from megaegpt.config import EGPTConfig, EncoderConfig
from megaegpt.config.run import RunConfig
from megaegpt.generation.generator import sample_text
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.checkpoint.reshaping import ZeroStage
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import (
    CHUNK,
    CHUNKS,
    StopAfter,
    corpus,
    encoder_config,
    losses,
    pretrain_quietly,
    records,
    run_config,
    validation_losses,
)

__all__ = ["corpus"]

MEMORY = EGPTConfig(
    num_chunks=CHUNKS,
    chunk_size=CHUNK,
    local_attention=True,
    token_memory=True,
    memory_dim=6,
    memory_pointers=2,
)


def _config(
    corpus: Path, folder: Path, tp: int = 1, stored: bool = False, stage: ZeroStage = 2
) -> RunConfig:
    encoder = EncoderConfig(source=str(folder.parent / "encoder"), overlap=2, batch_size=4)
    kept = "stored" if stored else "online"
    return run_config(
        "egpt",
        corpus,
        folder,
        model={"egpt": MEMORY, "encoder": encoder, "dropout": 0.0},
        data={"history_features": kept, "token_features": kept},
        parallel={"tensor_parallel_size": tp, "zero_stage": stage},
    )


def _train(
    corpus: Path, folder: Path, tp: int = 1, stop: int | None = None, stored: bool = False
) -> None:
    """Stopped after some steps, and gone on with, if ``stop`` is given."""
    pretrain_quietly(_config(corpus, folder, tp, stored), grid_for(tp), stop)


def _train_at_stage_3(corpus: Path, folder: Path) -> None:
    """Stopped after a step and gone on with, with a text at every evaluation."""
    config = _config(corpus, folder, stage=3)
    written = dataclasses.replace(config.generation, prompt="!", max_new_tokens=2)
    config = dataclasses.replace(config, generation=written)
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, grid_for(1), stops=StopAfter(1), sample_text=sample_text)
        pretrain(config, grid_for(1), resume=True, sample_text=sample_text)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory, distributed: Distributed) -> Path:
    """The run on one process."""
    folder = tmp_path_factory.mktemp("runs")
    gpt = build_model(encoder_config(max_seq_len=CHUNK + 2), ProcessGrid(), seed=7)
    save_weights(gpt, folder / "encoder", ProcessGrid())
    distributed(1, _train, corpus, folder / "alone")
    return folder / "alone"


@pytest.mark.parametrize(
    ("name", "ranks", "tp", "stored"),
    [("tensor_parallel", 2, 2, False), ("data_parallel", 2, 1, False), ("stored", 1, 1, True)],
)
def test_losses_are_those_of_one_process(
    corpus: Path, alone: Path, distributed: Distributed, name, ranks, tp, stored
) -> None:
    folder = alone.with_name(name)
    distributed(ranks, _train, corpus, folder, tp, None, stored)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    assert validation_losses(folder) == pytest.approx(validation_losses(alone), rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    corpus: Path, alone: Path, distributed: Distributed
) -> None:
    folder = alone.with_name("resumed")
    distributed(1, _train, corpus, folder, 1, 2)
    assert losses(folder) == losses(alone)
    assert validation_losses(folder) == validation_losses(alone)


def test_a_run_at_zero_stage_3_goes_on_behind_saves_and_evaluations(
    corpus: Path, alone: Path, distributed: Distributed
) -> None:
    """The memory's parameters are used outside of their module's pass, and stay whole."""
    folder = alone.with_name("stage_3")
    distributed(1, _train_at_stage_3, corpus, folder)
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    assert validation_losses(folder) == pytest.approx(validation_losses(alone), rel=1e-5)


def test_how_far_the_memory_is_used_is_recorded(alone: Path) -> None:
    shown = {r["step"]: r for r in records(alone) if "token_memory/share" in r}
    assert list(shown) == list(validation_losses(alone))
    assert all(0 < r["token_memory/share"] < 1 < r["token_memory/scale"] for r in shown.values())
