"""Models by name."""

from __future__ import annotations

import pytest

from megaegpt.config.presets import ALIASES, create_model_config
from megaegpt.errors import ConfigError
from megaegpt.model.build import meta_model

GPT2_PARAMETERS = {
    "gpt2-small (124M)": 124_439_808,
    "gpt2-medium (355M)": 354_823_168,
    "gpt2-large (774M)": 774_030_080,
    "gpt2-xl (1558M)": 1_557_611_200,
}
"""Of OpenAI's published weights, with the tied head counted once."""


def test_short_names_mean_the_same_models():
    for alias, name in ALIASES.items():
        assert create_model_config(alias) == create_model_config(name)
    assert set(ALIASES.values()) == set(GPT2_PARAMETERS)


def test_fields_can_be_replaced():
    config = create_model_config("gpt2-medium", num_kv_heads=4, egpt={"chunk_size": 512})
    assert (config.num_layers, config.kv_heads, config.egpt.chunk_size) == (24, 4, 512)


@pytest.mark.parametrize("name", GPT2_PARAMETERS)
@pytest.mark.parametrize(
    "overrides",
    [
        {"num_kv_heads": 1},
        {"attention": "latent", "latent_dim": 96},
        {"attention": "latent", "positions": "rotary", "rope_head_dim": 32},
        {"window": 256, "window_every": 4, "positions": "rotary"},
        {"positions": "none"},
    ],
)
def test_every_size_can_have_every_attention(name, overrides):
    config = create_model_config(name, **overrides)
    assert {key: getattr(config, key) for key in overrides} == overrides
    assert (
        meta_model(config).num_parameters()
        < 1.01 * meta_model(create_model_config(name)).num_parameters()
    )


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("gpt2-smal", {}, "did you mean 'gpt2-small'?"),
        ("bert", {}, "known are gpt2-small"),
        ("gpt2", {"num_kv_head": 4}, "num_kv_head is not a key; did you mean num_kv_heads?"),
        ("gpt2", {"num_kv_heads": "4"}, "num_kv_heads must be an integer or null, not '4'"),
        ("gpt2-xl", {"num_kv_heads": 4}, "model.num_heads=25 is not divisible by"),
    ],
)
def test_what_does_not_exist_is_refused(name, overrides, expected):
    with pytest.raises(ConfigError) as caught:
        create_model_config(name, **overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("name", "published"), GPT2_PARAMETERS.items())
def test_the_sizes_are_those_of_the_published_models(name, published):
    config = create_model_config(name)
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden_size
    assert meta_model(config).num_parameters() == published + padding
