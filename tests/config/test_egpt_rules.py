"""EGPT's keys: what has no effect, is out of range or does not fit the encoder is said by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megaegpt.config import (
    DataConfig,
    EGPTConfig,
    EncoderConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megaegpt.config.run import RunConfig
from megaegpt.config.validation import validate
from megaegpt.errors import ConfigError
from megaegpt.training.feature_stores import find_encoder, needs_store
from tests.tiny.runs import run_config, write_encoder

MODEL = ModelConfig(kind="egpt", encoder=EncoderConfig(source="somewhere"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"egpt": EGPTConfig(history=False, memory_gate=True)},
            "model.egpt.memory_gate=true has no effect with model.egpt.history=false",
        ),
        ({"encoder": EncoderConfig("x", layers=0)}, "model.encoder.layers=0 must be greater than"),
    ],
)
def test_a_value_without_sense_is_refused(changes, words):
    validate(RunConfig(model=MODEL))
    with pytest.raises(ConfigError, match=words):
        validate(RunConfig(model=replace(MODEL, **changes)))


def test_a_memory_begins_with_keys_of_no_more_numbers_than_a_state_has():
    egpt = EGPTConfig(token_memory=True, memory_dim=400, memory_pointers=2)
    run = RunConfig(model=replace(MODEL, egpt=egpt))
    validate(run)  # of weights that are there
    with pytest.raises(
        ConfigError, match=r"memory_dim=400 for each of .*memory_pointers=2 is more"
    ):
        validate(replace(run, data=replace(run.data, train=("text",))))


def test_stored_predictions_need_a_decoder_that_stays_as_it_is(tmp_path: Path):
    memory = EGPTConfig(token_memory=True, memory_gate=True)
    right = RunConfig(
        model=replace(MODEL, egpt=memory),
        data=DataConfig(token_features="stored", predictions="stored"),
        training=TrainingConfig(freeze=("head",)),
    )
    validate(right)
    wrong = [
        (replace(right, model=MODEL), "is for an egpt with model.egpt.token_memory, which alone"),
        (replace(right, data=DataConfig(predictions="stored")), "needs data.token_features=stored"),
        (replace(right, training=TrainingConfig()), "needs training.freeze: all parts but the tok"),
        (
            replace(right, model=replace(MODEL, egpt=EGPTConfig(token_memory=True))),
            "needs model.egpt.memory_gate=true",
        ),
        (
            replace(right, model=replace(right.model, dropout=0.1)),
            "is without dropout: model.dropout=0.1",
        ),
        (replace(right, parallel=ParallelConfig(zero_stage=3)), "zero_stage of 0 to 2: with 3"),
    ]
    for config, words in wrong:
        with pytest.raises(ConfigError, match=words):
            validate(config)


def test_what_does_not_fit_the_encoder_is_refused_together(tmp_path: Path):
    write_encoder(tmp_path / "encoder")  # two blocks with biases, four heads
    config = run_config("egpt", tmp_path, tmp_path)
    source = config.model.encoder.source
    encoder = EncoderConfig(source, layers=3, initialize_decoder=True)
    wrong = replace(config, model=replace(config.model, encoder=encoder, bias=False))
    with pytest.raises(ConfigError) as error:
        find_encoder(wrong)
    assert "it has 2 blocks, model.encoder.layers is 3" in str(error.value)
    assert "its bias is True, model's False" in str(error.value)
    cut = replace(config, model=replace(config.model, encoder=EncoderConfig(source, layers=1)))
    found = find_encoder(cut)
    assert found is not None
    assert found.num_layers == 1


def test_a_model_without_history_needs_no_store_of_it(tmp_path: Path):
    config = run_config("egpt", tmp_path, tmp_path)
    assert needs_store(config)
    blind = replace(
        config, model=replace(config.model, egpt=replace(config.model.egpt, history=False))
    )
    assert not needs_store(blind)
    assert needs_store(replace(blind, data=replace(blind.data, token_features="stored")))
