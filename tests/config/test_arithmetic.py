"""Two models compute the same from the same weights, or the keys that say otherwise are named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megaegpt.config import ModelConfig
from megaegpt.config.arithmetic import (
    DIGEST_VERSION,
    arithmetic_differences,
    arithmetic_digest,
    model_arithmetic,
)
from megaegpt.config.model import RopeScalingConfig
from tests.tiny.runs import encoder_config


def test_models_that_compute_the_same_have_the_same_arithmetic() -> None:
    plain = encoder_config()
    for same in (
        {"num_kv_heads": 4, "head_dim": 4, "ffn_hidden_size": 64, "qkv_bias": True},
        {"rope_base": 500.0},
        {"dropout": 0.3, "init_std": 0.1},
    ):
        assert model_arithmetic(encoder_config(**same)) == model_arithmetic(plain), same
    latent = encoder_config(attention="latent")
    assert model_arithmetic(dataclasses.replace(latent, latent_dim=latent.latent_size)) == (
        model_arithmetic(latent)
    )
    rotary = encoder_config(positions="rotary")
    assert model_arithmetic(dataclasses.replace(rotary, rope_base=5e5)) != model_arithmetic(rotary)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu"},
        {"layer_norm_eps": 1e-6},
        {"positions": "sinusoidal"},
        {"num_heads": 2},
        {"norm": "rms_norm"},
    ],
)
def test_a_digest_changes_with_the_arithmetic_and_not_with_how_it_is_said(
    changes: dict[str, Any],
) -> None:
    plain = encoder_config()
    other = encoder_config(**changes)
    assert arithmetic_digest(other) != arithmetic_digest(plain)
    (key,) = changes
    assert f"model.{key}" in arithmetic_differences(
        model_arithmetic(plain), model_arithmetic(other)
    )
    same = encoder_config(num_kv_heads=4, head_dim=4, ffn_hidden_size=64, dropout=0.3)
    assert arithmetic_digest(same) == arithmetic_digest(plain)


def test_the_activation_has_an_effect_beside_swiglu_in_the_input_mlp_of_an_egpt_alone() -> None:
    for kind in ("gpt", "deepgpt", "egpt"):
        tanh = ModelConfig(kind=kind, mlp="swiglu")
        exact = dataclasses.replace(tanh, activation="gelu")
        assert (model_arithmetic(tanh) != model_arithmetic(exact)) == (kind == "egpt")
        assert (arithmetic_digest(tanh) != arithmetic_digest(exact)) == (kind == "egpt")


def test_the_length_trained_before_scaling_is_part_of_it_said_or_not() -> None:
    yarn = RopeScalingConfig("yarn", factor=4.0)
    short, long = (
        encoder_config(positions="rotary", rope_scaling=yarn, max_seq_len=n) for n in (64, 128)
    )
    assert arithmetic_digest(short) != arithmetic_digest(long)
    scaling = dataclasses.replace(yarn, original_max_seq_len=16)
    said = dataclasses.replace(short, rope_scaling=scaling)
    assert model_arithmetic(said) == model_arithmetic(short)
    assert arithmetic_digest(said) == arithmetic_digest(short)
    assert "model.rope_scaling.original_max_seq_len" in arithmetic_differences(
        model_arithmetic(short), model_arithmetic(long)
    )
    before = {**model_arithmetic(short), "model.rope_scaling.original_max_seq_len": None}
    assert arithmetic_differences(before, model_arithmetic(short)) == {}
    linear = dataclasses.replace(yarn, kind="linear")
    plain = [dataclasses.replace(model, rope_scaling=linear) for model in (short, long)]
    assert arithmetic_digest(plain[0]) == arithmetic_digest(plain[1])


def test_a_key_that_came_later_had_its_default_before(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = encoder_config(), encoder_config(activation="gelu")
    digests = [arithmetic_digest(model) for model in (plain, other)]
    earlier = model_arithmetic(plain)
    for key in ("activation", "norm", "qkv_bias"):
        del earlier[f"model.{key}"]
    assert arithmetic_differences(earlier, model_arithmetic(plain)) == {}
    assert arithmetic_differences(earlier, model_arithmetic(other)) == {
        "model.activation": ("gelu_tanh", "gelu")
    }
    before = {**model_arithmetic(plain), "model.egpt.token_counts": False}  # a key that is no more
    assert arithmetic_differences(before, model_arithmetic(plain)) == {}
    monkeypatch.setattr(
        "megaegpt.config.arithmetic.ARITHMETIC_KEYS",
        {"model": "kind vocab_size hidden_size num_layers num_heads layer_norm_eps activation"},
    )
    assert [arithmetic_digest(model) for model in (plain, other)] == digests


def test_a_digest_says_its_version_and_takes_every_kind_of_model() -> None:
    for model in (ModelConfig(), ModelConfig(kind="egpt"), ModelConfig(attention="latent")):
        assert arithmetic_digest(model).startswith(DIGEST_VERSION)
