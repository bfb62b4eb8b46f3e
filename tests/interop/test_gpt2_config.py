"""Descriptions of a GPT-2 by transformers: read as it reads them, or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from megaegpt.config import ModelConfig
from megaegpt.errors import CheckpointError
from megaegpt.interop.description import Description
from megaegpt.interop.foreign_models import read_foreign
from megaegpt.interop.sources import source_config
from megaegpt.interop.translation import family_of, is_huggingface_folder, to_ours
from tests.tiny.gpt2 import SIZES, random_gpt2

HUGE = 10**9


def convert_config(values: dict[str, Any], source: str) -> ModelConfig:
    theirs = Description(values, source)
    return to_ours(theirs, family_of(theirs))


def test_what_a_file_leaves_out_is_what_transformers_takes() -> None:
    sparse = convert_config({"model_type": "gpt2"}, "here")
    assert sparse == convert_config(GPT2Config().to_dict(), "here") == ModelConfig()


def test_transformers_other_names_are_understood() -> None:
    names = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 9,
    }
    full = GPT2Config(**names).to_dict()
    config = convert_config({"model_type": "gpt2", **names}, "here")
    assert config == convert_config(full, "here")
    assert config.hidden_size == 48
    with pytest.raises(CheckpointError, match="here: n_embd=768, but hidden_size=48"):
        convert_config({"model_type": "gpt2", "n_embd": 768, "hidden_size": 48}, "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ["gpt2"]}, r"model_type=\['gpt2'\] is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"n_embd": "32"}, 'n_embd must be an integer, not "32"'),
        ({"n_embd": 32.0}, "n_embd must be an integer, not 32.0"),
        ({"n_layer": True}, "n_layer must be an integer, not true"),
        ({"n_layer": 0}, "num_layers"),
        ({"n_head": [4]}, "n_head must be an integer, not a list"),
        ({"n_inner": {}}, "n_inner must be an integer or null, not an object"),
        ({"n_inner": -1}, "ffn_hidden_size"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be true or false, not null"),
        ({"tie_word_embeddings": "true"}, 'tie_word_embeddings must be true or false, not "true"'),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be finite, not nan"),
        ({"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon must be a number, not 1000.*\.\.\."),
        ({"activation_function": ["gelu"]}, "activation_function must be text, not a list"),
    ],
)
def test_values_that_are_no_gpt2s_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        convert_config({"model_type": "gpt2", **SIZES, **changes}, "here")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", '"gpt2"', "{", "[" * 100_000, "\0", '{"n_embd": ' + "9" * 5000 + "}"],
)
def test_a_description_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert not is_huggingface_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_foreign(tmp_path)


def test_a_description_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")  # opening it would wait for a writer
    with pytest.raises(CheckpointError, match=r"config\.json .* it is no regular file"):
        read_foreign(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"n_layer": 10_000}, {"vocab_size": 2**31 - 1}, {"n_inner": 2**30}]
)
def test_a_model_larger_than_its_files_is_refused_before_it_is_built(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    random_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=r"describes a model of [0-9,]+ parameters or more"):
        source_config(tmp_path)
