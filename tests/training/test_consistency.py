"""Ranks that were given different things do not start."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaegpt import precision
from megaegpt.config import RunConfig
from megaegpt.config.loading import config_to_yaml
from megaegpt.errors import MegaEGPTError
from megaegpt.precision import Precision
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import corpus, run_config, write_corpus, write_encoder
from tools import precompute_features

__all__ = ["corpus"]


def _errors_of(choose: Callable[..., RunConfig], *arguments: Any) -> str:
    grid = grid_for(1)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            pretrain(choose(grid.rank, *arguments), grid)
        except MegaEGPTError as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError("they trained")


def _other_settings(rank: int, corpus: Path, folder: Path) -> RunConfig:
    config = run_config("gpt", corpus, folder)
    if rank == 0:
        return config
    model = dataclasses.replace(config.model, num_layers=1)
    training = dataclasses.replace(config.training, seed=5)
    return dataclasses.replace(config, model=model, training=training)


def _own_folder(rank: int, folder: Path, kind: str) -> RunConfig:
    online = {"history_features": "online"}
    return run_config(kind, folder / f"node{rank}", folder, data=online)


def test_ranks_that_were_given_different_things_do_not_start(
    tmp_path: Path, corpus: Path, distributed: Distributed
) -> None:
    for node, seed in (("node0", 7), ("node1", 8)):
        write_encoder(tmp_path / node / "encoder", seed)
        write_corpus(tmp_path / node)
    for error in distributed(2, _errors_of, _other_settings, corpus, tmp_path):
        assert error.startswith("LaunchError: ranks were not given the same: ")
        assert "model.num_layers is 2 on rank 0 and 1 on rank 1" in error
        assert "training.seed is 1337 on rank 0 and 5 on rank 1" in error
    for error in distributed(2, _errors_of, _own_folder, tmp_path, "egpt"):
        assert "what model.encoder.source holds is" in error
    write_corpus(tmp_path / "node1", seed=1)
    for error in distributed(2, _errors_of, _own_folder, tmp_path, "gpt"):
        assert "the fingerprint of the training samples is" in error
    shown_once, _ = distributed(2, _errors_of_the_tool, tmp_path)
    assert "the fingerprint of the train split is" in shown_once
    assert not (tmp_path / "features").exists()


def _errors_of_the_tool(folder: Path) -> str:
    rank = grid_for(1).rank
    config = folder / f"{rank}.yaml"
    config.write_text(config_to_yaml(run_config("egpt", folder / f"node{rank}", folder)))
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(shown):
        patch.setattr(sys, "argv", ["precompute_features", "--config", str(config)])
        with pytest.raises(SystemExit):
            precompute_features.main()
    return shown.getvalue()


def _own_device(rank: int, corpus: Path, folder: Path) -> RunConfig:
    return run_config("gpt", corpus, folder, training={"precision": "auto"})


def _errors_of_unlike_devices(corpus: Path, folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        own: Precision = ("fp32", "bf16")[grid_for(1).rank]
        patch.setattr(precision, "default_precision", lambda device_type: own)
        return _errors_of(_own_device, corpus, folder)


def test_ranks_whose_devices_compute_in_other_precisions_do_not_start(
    tmp_path: Path, corpus: Path, distributed: Distributed
) -> None:
    for error in distributed(2, _errors_of_unlike_devices, corpus, tmp_path):
        assert "what training.precision stands for is fp32 on rank 0 and bf16 on rank 1" in error
        assert "on devices of one kind" in error
