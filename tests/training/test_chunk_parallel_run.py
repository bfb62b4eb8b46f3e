"""Runs whose windows are shared by ranks: the same as without, stored or online, stopped or not."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from megaegpt.config import EGPTConfig, EncoderConfig
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import (
    CHUNK,
    StopAfter,
    corpus,
    encoder_config,
    losses,
    run_config,
    validation_losses,
)

__all__ = ["corpus"]

MEMORY = EGPTConfig(
    num_chunks=4, chunk_size=CHUNK, local_attention=True, token_memory=True, memory_dim=6
)


@dataclass(frozen=True)
class Run:
    """A run on all ranks: (tensor-parallel, context-parallel) sizes, and what a half is run by."""

    name: str
    sizes: tuple[int, int]
    resumed_by: tuple[int, int] | None = None
    """None: it is not stopped."""
    stored: bool = False
    stage: int = 2
    micro_batch_size: int = 2
    kind: str = "egpt"


def train(corpus: Path, folder: Path, runs: list[Run]) -> None:
    for run in runs:
        kept = "stored" if run.stored else "online"
        encoder = EncoderConfig(source=str(folder / "encoder"), overlap=2, batch_size=4)
        for sizes in (run.sizes, run.resumed_by):
            if sizes is None:
                continue
            tp, cp = sizes
            config = run_config(
                run.kind,
                corpus,
                folder / run.name,
                model={"egpt": MEMORY, "encoder": encoder, "dropout": 0.0},
                data={"history_features": kept, "token_features": kept},
                parallel={
                    "tensor_parallel_size": tp,
                    "context_parallel_size": cp,
                    "sequence_parallel": tp > 1,
                    "zero_stage": run.stage,
                },
                training={"micro_batch_size": run.micro_batch_size},
            )
            stops = StopAfter(3) if run.resumed_by and sizes == run.sizes else StopAfter(6)
            resume = sizes is run.resumed_by
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                assert pretrain(config, grid_for(tp, cp), resume=resume, stops=stops) == (
                    stops.left >= 0
                )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an encoder that sees an overlap."""
    folder = tmp_path_factory.mktemp("runs")
    grid = ProcessGrid()
    save_weights(
        build_model(encoder_config(max_seq_len=CHUNK + 2), grid, seed=7), folder / "encoder", grid
    )
    return folder


def assert_same(distributed: Distributed, corpus: Path, folder: Path, ranks: int, runs: list[Run]):
    """All as the first, of which a step has the same samples."""
    distributed(ranks, train, corpus, folder, runs)
    expected, validated = losses(folder / runs[0].name), validation_losses(folder / runs[0].name)
    assert len(expected) == 6
    assert len(validated) == 2
    for run in runs[1:]:
        assert losses(folder / run.name) == pytest.approx(expected, rel=1e-4), run.name
        assert validation_losses(folder / run.name) == pytest.approx(validated, rel=1e-4), run.name


@pytest.mark.long
def test_a_run_that_shares_windows_is_the_one_that_does_not(
    corpus: Path, folder: Path, distributed: Distributed
) -> None:
    runs = [
        Run("whole", (1, 1)),
        Run("stored", (1, 2), stored=True, stage=0),
        Run("begun_shared", (1, 2), resumed_by=(1, 1)),
    ]
    assert_same(distributed, corpus, folder, 2, runs)


@pytest.mark.long
def test_windows_are_shared_beside_tensor_and_data_parallel_ranks(
    corpus: Path, folder: Path, distributed: Distributed
) -> None:
    runs = [
        Run("dp4", (1, 1)),
        Run("tp2_cp2", (2, 2), stage=1),
        Run("dp2_cp2_accumulated", (1, 2), micro_batch_size=1),
        Run("cp4_stored", (1, 4), stored=True, stage=0),
        Run("cp4_then_dp4", (1, 4), resumed_by=(1, 1)),
        Run("dp4_then_cp4", (1, 1), resumed_by=(1, 4)),
        Run("cp4_stage_3", (1, 4), stage=3),
        Run("tp2_cp2_then_cp4", (2, 2), resumed_by=(1, 4), stage=1),
    ]
    assert_same(distributed, corpus, folder, 4, runs)
    kinds = [Run("deepgpt", (1, 1), kind="deepgpt"), Run("deepgpt_cp4", (1, 4), kind="deepgpt")]
    assert_same(distributed, corpus, folder, 4, kinds)
