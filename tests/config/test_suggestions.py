"""Which key is suggested for one that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.config import RunConfig
from megaegpt.config.loading import load_config, model_config_from_dict
from megaegpt.config.metadata import annotations_of
from megaegpt.config.suggestions import LIKELY_RUN_KEYS
from megaegpt.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        (
            "steps=100",
            "training.steps, training.batch_ramp.steps or logging.profile.steps",
        ),
        ("seed=3", "training.seed or generation.seed"),
        ("train=x", "data.train or data.instructions.train"),
        (
            "batch_size=8",
            "training.global_batch_size, training.micro_batch_size or model.encoder.batch_size",
        ),
        ("lr=1e-3", "optimizer.lr"),
        ("model.lr=1e-3", "optimizer.lr"),
        ("optimizer.learning_rate=1e-3", "optimizer.lr"),
        ("directory=x", "checkpoint.directory or logging.directory"),
        ("n_layer=2", "model.num_layers"),
        ("model.num_layrs=2", "model.num_layers"),
        ("chunk_size=8", "model.egpt.chunk_size"),
        ("micro_batch=8", "training.micro_batch_size"),
        ("trainin.steps=8", "training"),
    ],
)
def test_the_likely_key_comes_first_and_none_of_that_name_is_left_out(
    override: str, suggestion: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("")
    key = override.split("=")[0].removesuffix(".steps") if "." in override else override
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", [override])
    assert f"{key.split('=')[0]} is not a key; did you mean {suggestion}? (comm" in str(
        caught.value
    )


@pytest.mark.parametrize("name", LIKELY_RUN_KEYS)
def test_what_is_likely_exists(name: str) -> None:
    for dotted in LIKELY_RUN_KEYS[name]:
        section = RunConfig
        for part in dotted.split("."):
            assert part in annotations_of(section), dotted
            section = annotations_of(section)[part]


def test_a_models_own_file_is_not_told_of_a_runs_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        model_config_from_dict({"steps": 3, "chunk_size": 8})
    assert "steps is not a key; the keys at the top are kind, vocab_size" in str(caught.value)
    assert "chunk_size is not a key; did you mean egpt.chunk_size?" in str(caught.value)


def test_a_file_of_nothing_but_unknown_keys_is_refused_quickly_and_briefly(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(f"optimiser_{n}: {n}" for n in range(9_000)))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).count("\n") < 40
    assert str(caught.value).endswith("and 8,970 more")
