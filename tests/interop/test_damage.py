"""Damaged weights, ours and Hugging Face's, give this project's errors and no others."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from megaegpt.config import ModelConfig
from megaegpt.errors import MegaEGPTError
from megaegpt.interop.export import export_huggingface
from megaegpt.interop.sources import resolve_weights_source, source_config
from megaegpt.model.build import build_model, empty_model
from megaegpt.model.weights import load_weights, read_weights_config, save_weights
from megaegpt.parallel.grid import ProcessGrid
from tests.damage import damaged

GRID = ProcessGrid()
TINY = ModelConfig(vocab_size=50, max_seq_len=4, hidden_size=8, num_layers=1, num_heads=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAEGPT_CACHE", str(tmp_path / "cache"))


def _use(folder: Path) -> None:
    """What a run does with a source of weights."""
    source_config(folder)
    weights = resolve_weights_source(folder, GRID)
    model = empty_model(read_weights_config(weights)[0], GRID)
    load_weights(model, weights, GRID)


def _error_of(folder: Path) -> str | None:
    try:
        _use(folder)
    except MegaEGPTError as error:
        return str(error)
    return None


def _fuzz(whole: Path, scratch: Path, rounds: int) -> dict[str, int]:
    """How often damage to each file was refused."""
    draw = random.Random(5)
    refused = dict.fromkeys(sorted(p.name for p in whole.iterdir()), 0)
    for number in range(rounds):
        folder = scratch / str(number)
        shutil.copytree(whole, folder)
        path = folder / draw.choice(list(refused))
        path.write_bytes(damaged(path.read_bytes(), draw))
        said = _error_of(folder)
        if said is not None:
            assert str(folder) in said
            refused[path.name] += 1
        shutil.rmtree(folder)
    return refused


def test_our_weights(tmp_path: Path) -> None:
    save_weights(build_model(TINY, GRID), tmp_path / "weights", GRID, {"step": 3})
    refused = _fuzz(tmp_path / "weights", tmp_path / "scratch", 150)
    assert all(count > 50 for count in refused.values()), refused


def test_huggingface_folders(tmp_path: Path) -> None:
    save_weights(build_model(TINY, GRID), tmp_path / "weights", GRID)
    export_huggingface(tmp_path / "weights", tmp_path / "theirs")
    refused = _fuzz(tmp_path / "theirs", tmp_path / "scratch", 120)
    assert all(count > 10 for count in refused.values()), refused
