"""Weights folders: full tensors under names that do not know of tensor parallelism."""

import json
from dataclasses import replace

import pytest
import torch

from megaegpt.config import EGPTConfig, ModelConfig
from megaegpt.errors import CheckpointError
from megaegpt.model.build import build_model, empty_model
from megaegpt.model.weights import (
    find_weights,
    load_weights,
    read_weights_config,
    save_weights,
    verify_weights,
)
from megaegpt.parallel.grid import ProcessGrid
from tests.distributed.harness import grid_for

GRID = ProcessGrid()
GPT = ModelConfig(vocab_size=300, max_seq_len=8, hidden_size=16, num_layers=2, num_heads=2)
EGPT = replace(GPT, kind="egpt", egpt=EGPTConfig(num_chunks=3, chunk_size=8, memory_gate=True))


@pytest.mark.parametrize("config", [GPT, EGPT, replace(EGPT, kind="deepgpt")])
def test_what_is_saved_is_loaded(tmp_path, config):
    model = build_model(config, GRID, seed=4)
    save_weights(model, tmp_path, GRID, {"step": 7})
    loaded_config, extra = read_weights_config(tmp_path)
    assert (loaded_config, extra) == (config, {"step": 7})
    again = empty_model(loaded_config, GRID)
    load_weights(again, tmp_path, GRID)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def _save_and_reload(folder: str) -> bool:
    """Save at TP 2, load at TP 2 and at TP 1."""
    pair = grid_for(2)
    model = build_model(EGPT, pair, seed=4)
    save_weights(model, folder, pair)
    torch.distributed.barrier()
    same = True
    for grid in (pair, GRID):
        again = empty_model(EGPT, grid)
        load_weights(again, folder, grid)
        expected = build_model(EGPT, grid, seed=4)
        same &= all(
            torch.equal(a, b)
            for a, b in zip(again.parameters(), expected.parameters(), strict=True)
        )
    return same


def test_weights_saved_at_tp_2_load_at_tp_1_and_2(distributed, tmp_path):
    assert distributed(2, _save_and_reload, str(tmp_path)) == [True, True]


def test_damaged_foreign_and_unfitting_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a weights folder"):
        read_weights_config(tmp_path)
    save_weights(build_model(GPT, GRID), tmp_path, GRID)
    config = json.loads((tmp_path / "config.json").read_text())
    deeper = empty_model(replace(GPT, num_layers=3), GRID)
    with pytest.raises(CheckpointError, match=r"it lacks stack\.blocks\.2\."):
        load_weights(deeper, tmp_path, GRID)
    with pytest.raises(CheckpointError, match=r"positions\.table\.weight has shape \(8, 16\)"):
        load_weights(empty_model(replace(GPT, max_seq_len=9), GRID), tmp_path, GRID)
    (tmp_path / "config.json").write_text(json.dumps(config | {"version": 99}))
    with pytest.raises(CheckpointError, match="version 99; this program reads 1"):
        read_weights_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a MegaEGPT weights description"):
        read_weights_config(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(empty_model(GPT, GRID), tmp_path, GRID)


def test_a_sparse_file_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    save_weights(build_model(GPT, GRID), tmp_path, GRID)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    for check in (verify_weights, lambda path: load_weights(empty_model(GPT, GRID), path, GRID)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            check(tmp_path)


@pytest.mark.parametrize(
    ("size", "content", "message"),
    [
        (3 << 30, b"", "latest is damaged: it does not hold the name of a checkpoint"),
        (300, b"a" * 300, "latest is damaged: it does not hold the name of a checkpoint"),
        (0, b"", "latest is empty: give a checkpoint beside it"),
        (1, b"\n", "latest is empty: give a checkpoint beside it"),
        (14, b"step_00000007\n", "latest names 'step_00000007', and there is no such checkpoint"),
    ],
)
@pytest.mark.parametrize("deeper", [False, True])
def test_a_file_latest_that_names_no_checkpoint_is_named(tmp_path, size, content, message, deeper):
    place = tmp_path / "checkpoints"
    place.mkdir()
    with (place / "latest").open("wb") as file:
        file.write(content)
        file.truncate(size)
    with pytest.raises(CheckpointError, match=f"holds no weights: {place}/{message}"):
        find_weights(place if deeper else tmp_path)


def test_a_run_without_a_checkpoint_is_told_from_a_folder_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights: give a folder with config"):
        find_weights(tmp_path)
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="holds no weights: this run has no checkpoint yet"):
        find_weights(tmp_path)
    with pytest.raises(CheckpointError, match="absent holds no weights: there is no such folder"):
        find_weights(tmp_path / "absent")


def test_a_path_that_is_not_utf8_is_named_as_what_is_wrong(tmp_path):
    folder = tmp_path / "caf\udce9"
    save_weights(build_model(GPT, GRID), folder, GRID)
    for check in (verify_weights, lambda path: load_weights(empty_model(GPT, GRID), path, GRID)):
        with pytest.raises(CheckpointError, match="path is not UTF-8: rename it or its folder"):
            check(folder)
    folder.rename(tmp_path / "café")
    verify_weights(tmp_path / "café")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_unless_they_are_asked_for(tmp_path, value):
    model = build_model(GPT, GRID)
    with torch.no_grad():
        model.embedding.weight[2, :3] = value
    save_weights(model, tmp_path, GRID)
    again = empty_model(GPT, GRID)
    with pytest.raises(
        CheckpointError, match=r": 3 of the .* of embedding\.weight are infinite or"
    ):
        load_weights(again, tmp_path, GRID)
    load_weights(again, tmp_path, GRID, allow_nonfinite=True)
    assert torch.equal(again.embedding.weight.nan_to_num(), model.embedding.weight.nan_to_num())
