"""What is measured: each target once, other windows' features, bins, verdicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import DataError
from megaegpt.evaluation.history import HISTORIES
from megaegpt.generation.trained import LoadedModel
from megaegpt.model.build import build_model
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.held_tokens import MemoryLimits
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.feature_stores import prepare_store
from megaegpt.training.frozen_predictions import FrozenDecoder
from tests.tiny.runs import CHUNK, CHUNKS, VOCAB, encoder_config, run_config
from tools.experiment.measure import Stores, Text, nats_with_memory, summarize, token_nats
from tools.experiment.report import binned, compare_losses, insert

LENGTH = 3 * CHUNK * CHUNKS + 5  # three whole windows, and four targets of a fourth


@pytest.fixture
def text(tmp_path: Path) -> Text:
    with ShardWriter(tmp_path / "report") as writer:
        writer.add_document(np.random.default_rng(1).integers(0, VOCAB, LENGTH).astype(np.uint16))
        writer.finish()
    stream = TokenStream([str(tmp_path / "report")])
    with pytest.raises(DataError, match="needs two windows of 48"):
        Text(stream, CHUNKS * 2, CHUNK)
    return Text(stream, CHUNKS, CHUNK)


def _loaded(kind: str, **encoder_changes: Any) -> LoadedModel:
    encoder = FrozenEncoder(build_model(encoder_config(**encoder_changes), ProcessGrid(), seed=1))
    if kind == "gpt":
        return LoadedModel(encoder.gpt, None, None)  # type: ignore[arg-type]
    config = replace(run_config(kind, Path(), Path()).model, init_std=0.3)
    model = build_model(config, ProcessGrid(), seed=2).eval()
    return LoadedModel(model, encoder, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt", "deepgpt", "egpt"])
def test_every_target_is_counted_once_whatever_the_batch(text: Text, kind: str) -> None:
    loaded = _loaded(kind)
    nats = token_nats(loaded, text, 3, torch.float32)
    assert nats.shape == (4, CHUNKS, CHUNK)
    assert (nats != 0).sum() == LENGTH - 1
    np.testing.assert_allclose(token_nats(loaded, text, 1, torch.float32), nats, rtol=1e-5)
    result = summarize(nats, text, np.full(VOCAB, 2))
    assert result["tokens"] == LENGTH - 1
    assert result["nats_per_byte"] == pytest.approx(result["loss"] / 2)
    counts = (text.targets != -100).sum((0, 2))
    assert np.dot(result["by_chunk"], counts) / counts.sum() == pytest.approx(result["loss"])


def test_a_gpt_reads_each_chunk_by_itself(text: Text) -> None:
    loaded = _loaded("gpt")
    nats = token_nats(loaded, text, 3, torch.float32)
    tokens = torch.from_numpy(text.source.read(2 * CHUNK, CHUNK + 1).astype(np.int64))[None]
    expected = loaded.model(tokens[:, :-1], tokens[:, 1:], reduction="none").double().numpy()
    np.testing.assert_allclose(nats[0, 2], expected[0], rtol=1e-5)


def test_features_are_true_those_of_another_window_or_zero(text: Text) -> None:
    loaded = _loaded("egpt")
    losses = [token_nats(loaded, text, 2, torch.float32, kind) for kind in HISTORIES]
    assert len({nats[:, 1:].sum() for nats in losses}) == 3
    for nats in losses[1:]:
        np.testing.assert_allclose(nats[:, 0], losses[0][:, 0], rtol=1e-5)


@pytest.mark.parametrize("overlap", [0, 3])
def test_stored_states_and_predictions_give_the_losses_of_the_computed_ones(
    text: Text, tmp_path: Path, overlap: int
) -> None:
    loaded = _loaded("egpt", max_seq_len=CHUNK + overlap)
    text = Text(text.source, CHUNKS, CHUNK, before=max(overlap, 1))
    egpt = replace(
        loaded.model.config.egpt, local_attention=True, memory_gate=True, token_memory=True
    )
    encoder = replace(
        loaded.model.config.encoder, source=str(tmp_path / "encoder"), overlap=overlap
    )
    config = run_config("egpt", tmp_path, tmp_path, data={"token_features": "stored"})
    config = replace(
        config, model=replace(config.model, egpt=egpt, encoder=encoder, positions="rotary")
    )
    model = build_model(config.model, ProcessGrid(), seed=2).requires_grad_(False).eval()
    loaded = LoadedModel(model, loaded.encoder, loaded.tokenizer)
    assert loaded.encoder is not None
    assert isinstance(model, EGPT)
    stream, grid = text.source, ProcessGrid()
    assert isinstance(stream, TokenStream)
    states = prepare_store(config, grid, loaded.encoder, stream, "report", "fp32")
    predicted = FrozenDecoder(model, grid, "fp32").prepare(config, states, stream, "report")
    for kind in HISTORIES:
        computed = token_nats(loaded, text, 2, torch.float32, kind)
        stored = token_nats(loaded, text, 2, torch.float32, kind, Stores(states, predicted))
        np.testing.assert_allclose(stored, computed, rtol=1e-4)
    limits = MemoryLimits(3 * CHUNK)
    computed = nats_with_memory(loaded, text, torch.float32, limits)
    stored = nats_with_memory(loaded, text, torch.float32, limits, Stores(states, predicted))
    np.testing.assert_allclose(stored, computed, rtol=1e-4)


def test_the_tables_in_the_documentation_are_those_of_the_report_beside_it() -> None:
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "egpt.md").read_text(encoding="utf-8")
    reports = list((docs / "experiments").glob("*/report.json"))
    assert reports
    for path in reports:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert insert(page, report, path.parent.name) == page


def test_positions_are_binned_by_powers_of_two() -> None:
    assert binned([1.0, 2.0, 3.0, 5.0, 7.0, 7.0]) == {"0": 1, "1": 2, "2-3": 4, "4-5": 7}


def _losses(*by_seed: float) -> dict[str, Any]:
    sd = stdev(by_seed) if len(by_seed) > 1 else None
    seeds = {str(seed): loss for seed, loss in enumerate(by_seed, 1)}
    return {"mean": mean(by_seed), "sd": sd, "by_seed": seeds}


@pytest.mark.parametrize(
    ("by_seed", "words"),
    [
        (
            (2.9, 3.1),
            "has 3.0000 nats/token, B 3.5000: better, a gain of +0.5000 where losses vary",
        ),
        ((3.9, 4.1), "B 3.5000: worse, a gain of -0.5000"),
        ((3.2, 3.4), "no difference, a gain of +0.2000"),
    ],
)
def test_a_verdict_needs_twice_the_larger_spread(by_seed, words) -> None:
    assert words in compare_losses(_losses(3.45, 3.55), _losses(*by_seed), "B")


def test_the_spread_of_a_gain_is_that_of_its_seeds() -> None:
    said = compare_losses(_losses(4.0, 5.0), _losses(3.0, 4.0), "B")
    assert "no difference, a gain of +1.0000 where losses vary by 0.7071" in said
    assert "(and the gain itself by 0.0000)" in said
    assert "one seed says nothing" in compare_losses(_losses(4.0), _losses(3.0), "B")
