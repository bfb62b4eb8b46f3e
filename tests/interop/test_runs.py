"""Runs that begin with Hugging Face's weights, as the model or as the frozen encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from megaegpt.config import EncoderConfig, RunConfig
from megaegpt.data.tokens.samples import PretrainingSamples
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import ConfigError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.feature_stores import find_encoder
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed
from tests.interop.over_ranks import run_over_ranks
from tests.tiny.gpt2 import random_gpt2
from tests.tiny.runs import CHUNK, HIDDEN, VOCAB, corpus, losses, run_config

__all__ = ["corpus"]


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPT-2 in the shape of the tiny runs."""
    monkeypatch.setenv("MEGAEGPT_CACHE", str(tmp_path / "cache"))
    sizes = {"vocab_size": VOCAB, "n_positions": CHUNK, "n_embd": HIDDEN}
    random_gpt2(**sizes).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def _gpt(corpus: Path, folder: Path, theirs: Path) -> RunConfig:
    return run_config(
        "gpt",
        corpus,
        folder,
        model={"dropout": 0.0},
        parallel={"tensor_parallel_size": 2},
        training={"steps": 3, "eval_interval": 100, "initialize_from": str(theirs)},
        data={"validation": ()},
    )


def test_a_gpt_begins_with_their_loss(
    distributed: Distributed, corpus: Path, tmp_path: Path, theirs: Path
) -> None:
    config = _gpt(corpus, tmp_path / "run", theirs)
    distributed(2, run_over_ranks, config, str(tmp_path / "cache"))
    samples = PretrainingSamples(TokenStream(config.data.train), CHUNK, config.training.seed)
    arrays = samples.batch(np.arange(config.training.global_batch_size))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        expected = _their_loss(theirs, batch)
    assert losses(tmp_path / "run")[1] == pytest.approx(expected, abs=1e-4)


def _their_loss(folder: Path, batch: dict[str, torch.Tensor]) -> float:
    from transformers import AutoModelForCausalLM

    logits = AutoModelForCausalLM.from_pretrained(folder)(batch["tokens"]).logits
    targets = batch["targets"].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).item()


def test_an_egpt_is_trained_over_them(
    distributed: Distributed, corpus: Path, tmp_path: Path, theirs: Path
) -> None:
    config = run_config("egpt", corpus, tmp_path / "run", parallel={"tensor_parallel_size": 2})
    encoder = EncoderConfig(source=str(theirs), batch_size=4)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))
    found = find_encoder(config)
    assert found is not None
    assert found.hidden_size == HIDDEN
    distributed(2, run_over_ranks, config, str(tmp_path / "cache"))
    assert sorted(losses(tmp_path / "run")) == list(range(1, 7))


def test_weights_of_the_same_shapes_that_compute_something_else_are_refused(
    corpus: Path, tmp_path: Path, theirs: Path
) -> None:
    config = _gpt(corpus, tmp_path / "run", theirs)
    model = dataclasses.replace(config.model, num_heads=2, activation="gelu")
    parallel = dataclasses.replace(config.parallel, tensor_parallel_size=1)
    other = dataclasses.replace(config, model=model, parallel=parallel)
    with (
        pytest.raises(ConfigError, match=r"num_heads is 4 there and 2 here; model.activation is"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        pretrain(other, ProcessGrid())
