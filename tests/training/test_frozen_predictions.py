"""Runs in which the token memory alone learns: what blocks and head predict is stored and read."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaegpt.config import EGPTConfig, EncoderConfig
from megaegpt.config.loading import config_to_yaml
from megaegpt.config.run import RunConfig
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.data.tokens.windows import EvaluationWindows
from megaegpt.errors import ConfigError, DataError
from megaegpt.labels import IGNORE
from megaegpt.model.build import build_inputs, build_model
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.feature_stores import prepare_store
from megaegpt.training.frozen_predictions import FrozenDecoder
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import (
    CHUNK,
    CHUNKS,
    VALIDATION_TOKENS,
    corpus,
    encoder_config,
    losses,
    pretrain_quietly,
    run_config,
    validation_losses,
)
from tools import precompute_features

__all__ = ["corpus"]

MEMORY = EGPTConfig(
    num_chunks=CHUNKS,
    chunk_size=CHUNK,
    local_attention=True,
    attention_sink=True,
    memory_gate=True,
    adapter_residual=True,
    token_memory=True,
    memory_dim=6,
)
FROZEN = ("layers:0", "norm", "head", "input_mlp", "embeddings", "sink")


def _config(
    corpus: Path, folder: Path, stored: bool, tp: int = 1, cp: int = 1, **changes: Any
) -> RunConfig:
    encoder = EncoderConfig(
        str(folder.parent / "encoder"), overlap=2, batch_size=4, layers=2, initialize_decoder=True
    )
    model = {
        "egpt": MEMORY,
        "encoder": encoder,
        "dropout": 0.0,
        "num_layers": 1,
        "positions": "rotary",
    }
    kept = "stored" if stored else "online"
    data = {"history_features": "online", "token_features": kept, "predictions": kept}
    parallel = {"tensor_parallel_size": tp, "context_parallel_size": cp}
    sections = {"model": model, "data": data, "parallel": parallel, "training": {"freeze": FROZEN}}
    for name, values in changes.items():
        sections[name] = {**sections[name], **values}
    return run_config("egpt", corpus, folder, **sections)


def _train(
    corpus: Path,
    folder: Path,
    stored: bool,
    tp: int = 1,
    cp: int = 1,
    stop: int | None = None,
) -> None:
    """Stopped after some steps, and gone on with, if ``stop`` is given."""
    config = _config(corpus, folder, stored, tp, cp)
    pretrain_quietly(config, grid_for(tp, cp), stop)


@pytest.fixture(scope="module")
def online(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, distributed: Distributed
) -> Path:
    """The run on one process that computes everything in the loop."""
    folder = tmp_path_factory.mktemp("runs")
    config = encoder_config(max_seq_len=CHUNK + 2, num_layers=3, positions="rotary")
    gpt = build_model(config, ProcessGrid(), seed=7)
    save_weights(gpt, folder / "encoder", ProcessGrid())
    distributed(1, _train, corpus, folder / "online", False)
    return folder / "online"


@pytest.fixture(scope="module")
def stored(corpus: Path, online: Path, distributed: Distributed) -> Path:
    """The same run that reads what is predicted without a memory."""
    distributed(1, _train, corpus, online.with_name("stored"), True)
    return online.with_name("stored")


def _assert_same(folder: Path, other: Path) -> None:
    assert losses(folder) == pytest.approx(losses(other), rel=1e-5)
    assert validation_losses(folder) == pytest.approx(validation_losses(other), rel=1e-5)


def test_a_run_that_reads_predictions_is_the_one_that_computes_them(
    online: Path, stored: Path
) -> None:
    _assert_same(stored, online)
    (folder,) = (stored / "features").glob("predictions_*")
    hidden = np.load(folder / "validation" / "hidden-00000.npy")
    assert hidden.shape[1:] == (CHUNK, encoder_config().hidden_size)


@pytest.mark.parametrize(
    ("name", "ranks", "tp", "cp"),
    [("data_parallel", 2, 1, 1), ("tensor_parallel", 2, 2, 1), ("chunk_parallel", 3, 1, 3)],
)
def test_ranks_read_predictions_as_one_process_does(
    corpus: Path, online: Path, distributed: Distributed, name: str, ranks: int, tp: int, cp: int
) -> None:
    folder = online.with_name(name)
    distributed(ranks, _train, corpus, folder, True, tp, cp)
    _assert_same(folder, online)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    corpus: Path, stored: Path, distributed: Distributed
) -> None:
    folder = stored.with_name("resumed")
    distributed(1, _train, corpus, folder, True, 1, 1, 2)
    assert losses(folder) == losses(stored)
    assert validation_losses(folder) == validation_losses(stored)


def test_memories_of_any_kind_and_seed_share_what_one_decoder_predicts(
    corpus: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {"egpt": dataclasses.replace(MEMORY, memory_dim=3)}
    seed = {"seed": 5}  # of the memory, and of weights that do nothing
    config = _config(corpus, stored.with_name("narrow"), True, model=narrow, training=seed)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, features=str(stored / "features"))
    )
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    written = {path: path.stat().st_mtime_ns for path in (stored / "features").rglob("*.npy")}
    monkeypatch.setattr(sys, "argv", ["precompute", "--config", str(tmp_path / "run.yaml")])
    precompute_features.main()
    again = {path: path.stat().st_mtime_ns for path in (stored / "features").rglob("*.npy")}
    assert again == written


def test_predictions_are_not_computed_before_there_is_a_text_to_begin_on(
    corpus: Path,
    online: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _config(corpus, online.with_name("no_text"), True, data={"train": ()})
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    monkeypatch.setattr(sys, "argv", ["precompute", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit, match="2"):
        precompute_features.main()
    assert "data.train has 0 tokens: a token memory" in capsys.readouterr().err


def _decoder(config: RunConfig, change: str | None = None) -> FrozenDecoder:
    model = build_model(config.model, ProcessGrid())
    assert isinstance(model, EGPT)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("token_memory."))
        if change is not None and change in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return FrozenDecoder(model, ProcessGrid(), "fp32")


def test_a_decoder_that_changes_or_sees_earlier_chunks_is_refused(
    corpus: Path, online: Path
) -> None:
    config = _config(corpus, online.with_name("refused"), True, training={"freeze": ("norm",)})
    with pytest.raises(ConfigError, match=r"add .*layers:0, head to training\.freeze"):
        pretrain(config, ProcessGrid())
    with pytest.raises(ConfigError, match="closed memory gates"):
        _decoder(config, "attention.gate")
    learned = dataclasses.replace(
        config, model=dataclasses.replace(config.model, positions="learned")
    )
    _decoder(learned)
    with pytest.raises(ConfigError, match="all chunks of a window are alike"):
        _decoder(learned, "chunk_positions.table.weight")


def test_another_decoder_s_predictions_lie_elsewhere_and_a_store_knows_its_own(
    corpus: Path, online: Path, tmp_path: Path
) -> None:
    config = _config(corpus, online.with_name("apart"), True)
    stream = TokenStream(config.data.validation)
    encoder = FrozenEncoder.from_source(config.model.encoder, ProcessGrid())
    states = prepare_store(config, ProcessGrid(), encoder, stream, "validation", "fp32")
    decoders = [_decoder(config), _decoder(config, "head.weight")]
    stores = [decoder.prepare(config, states, stream, "validation") for decoder in decoders]
    assert stores[0].folder != stores[1].folder
    (stores[0].folder / "plan.json").unlink()
    stores[1].folder.rename(stores[1].folder.with_name("aside"))
    stores[0].folder.rename(stores[1].folder)
    with pytest.raises(DataError, match=r"decoder is .* there and .* here"):
        decoders[1].prepare(config, states, stream, "validation")


def test_weights_before_an_input_mlp_that_ends_in_zeros_do_not_tell_decoders_apart(
    corpus: Path, online: Path
) -> None:
    config = _config(corpus, online.with_name("apart"), True)
    initial, before, end, both = (
        _decoder(config, change).fingerprint
        for change in (None, "input_mlp.up", "input_mlp.down", "input_mlp")
    )
    assert before == initial
    assert len({initial, end, both}) == 3


def test_a_decoder_is_known_by_the_weights_that_it_computes_with(
    corpus: Path, online: Path
) -> None:
    """A checkpoint holds frozen weights as they are computed with: going on from it finds what was
    stored."""
    config = _config(corpus, online.with_name("apart"), True)
    model = build_model(config.model, ProcessGrid())
    assert isinstance(model, EGPT)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("token_memory."))
    precise, rounded = (
        FrozenDecoder(model, ProcessGrid(), p).fingerprint for p in ("fp32", "bf16")
    )
    assert precise != rounded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    assert FrozenDecoder(model, ProcessGrid(), "bf16").fingerprint == rounded


def test_what_is_stored_is_what_the_decoder_makes_of_each_chunk(
    corpus: Path, online: Path, tmp_path: Path
) -> None:
    config = _config(corpus, online.with_name("parts"), True, data={"feature_dtype": "bfloat16"})
    stream = TokenStream(config.data.validation)
    encoder = FrozenEncoder.from_source(config.model.encoder, ProcessGrid())
    states = prepare_store(config, ProcessGrid(), encoder, stream, "validation", "fp32")
    decoder = _decoder(config)
    store = decoder.prepare(config, states, stream, "validation")
    ids = torch.tensor([[25, 3]])  # the last whole chunk of the split, and one within
    hidden, log_probabilities = store.predictions(ids).values()
    tokens = torch.from_numpy(stream.read(0, VALIDATION_TOKENS).astype(np.int64))
    targets = torch.stack([tokens[i * CHUNK + 1 : (i + 1) * CHUNK + 1] for i in ids[0].tolist()])
    expected = decoder.predict(states.token_states(ids[0]), targets)
    assert hidden.dtype == torch.bfloat16
    assert log_probabilities.dtype == torch.float32  # bf16 would leave three digits
    assert hidden[0].equal(expected[0].bfloat16())
    torch.testing.assert_close(log_probabilities[0], expected[1], rtol=1e-6, atol=1e-6)
    assert IGNORE not in targets


def test_nothing_that_is_stored_is_encoded_or_predicted_again(
    corpus: Path, online: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, grid = _config(corpus, online.with_name("once"), True), ProcessGrid()
    stream = TokenStream(config.data.validation)
    encoder = FrozenEncoder.from_source(config.model.encoder, grid)
    states = prepare_store(config, grid, encoder, stream, "validation", "fp32")
    decoder = _decoder(config)
    inputs = build_inputs(
        config.model,
        encoder,
        token_states=states,
        predictions=decoder.prepare(config, states, stream, "validation"),
    )
    before = config.model.preceding_tokens
    windows = EvaluationWindows(stream, CHUNKS * CHUNK, CHUNKS, overlap=before)
    assert VALIDATION_TOKENS % CHUNK > 1  # its last chunk is partial, and its last window padded
    numbers = np.arange(len(windows))
    batch = {name: torch.from_numpy(x) for name, x in windows.batch(numbers).items()}
    model = build_model(config.model, grid)
    online = build_inputs(config.model, encoder)
    expected = online.loss(model, online.prepare(batch))
    for part in (encoder.gpt.stack, model.stack, model.head):
        monkeypatch.setattr(part, "forward", None)
    assert inputs.loss(model, inputs.prepare(batch)).item() == pytest.approx(expected.item())
