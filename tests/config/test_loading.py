"""What a user may write in a configuration, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.config import ModelConfig
from megaegpt.config.loading import (
    config_from_values,
    config_to_dict,
    config_to_yaml,
    load_config,
    model_config_from_dict,
)
from megaegpt.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def write_yaml(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_yaml


def error_of(path: Path, *overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size)
    return str(caught.value)


def test_an_empty_file_and_empty_sections_are_all_defaults(write):
    assert load_config(write("")) == load_config(write("model:\noptimizer:\n"))


def test_values_reach_their_typed_fields(write):
    config = load_config(
        write(
            "model: {num_layers: 3, dropout: 0, num_kv_heads: null, egpt: {chunk_size: 64}}\n"
            "data: {train: [a, b], validation: c}\n"
            "optimizer: {lr: 1e-3, eps: 1.0e-8}\n"
        )
    )
    assert config.model.num_layers == 3
    assert config.model.dropout == 0.0
    assert isinstance(config.model.dropout, float)
    assert config.model.num_kv_heads is None
    assert config.model.egpt.chunk_size == 64
    assert config.data.train == ("a", "b")
    assert config.data.validation == ("c",)
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-3, 1e-8)


def test_all_problems_come_in_one_message_with_the_closest_key(write):
    message = error_of(
        write(
            "model: {num_layrs: 4, hidden_size: wide, num_heads: 6}\n"
            "parallel: {tensor_parallel_size: 4}\n"
            "training: {global_batch_size: 6, micro_batch_size: 4}\n"
        )
    )
    assert "4 problems" in message
    assert "model.num_layrs is not a key; did you mean model.num_layers?" in message
    assert "model.hidden_size must be an integer, not 'wide'" in message
    assert "model.num_heads=6 is not divisible by parallel.tensor_parallel_size=4" in message
    assert "training.global_batch_size=6 is not divisible by" in message


def test_no_follow_up_problem_is_invented_from_a_value_that_was_refused(write):
    message = error_of(write("model: {num_heads: many}\nparallel: {tensor_parallel_size: 8}\n"))
    assert "problems" not in message
    assert "model.num_heads must be an integer" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {compile: 1}", "training.compile must be true or false, not 1"),
        ("training: {steps: true}", "training.steps must be an integer, not true"),
        (
            "training: {micro_batch_size: atuo}",
            "training.micro_batch_size must be an integer or auto, not 'atuo'; did you mean auto?",
        ),
        (
            "training: {micro_batch_size: 1.5}",
            "training.micro_batch_size must be an integer or auto, not 1.5",
        ),
        ("training: {steps: 1.5}", "training.steps must be an integer, not 1.5"),
        ("training: {steps: 1e3}", "training.steps must be an integer, not 1000.0"),
        ("model: {num_kv_heads: two}", "must be an integer or null, not 'two'"),
        ("optimizer: {lr: '0.1'}", "optimizer.lr must be a number, not '0.1'"),
        ("optimizer: {lr: .nan}", "optimizer.lr must be a number, not nan (it must be finite)"),
        ("parallel: {zero_stage: 4}", "parallel.zero_stage must be one of 0, 1, 2, 3, not 4"),
        ("parallel: {zero_stage: true}", "parallel.zero_stage must be one of 0, 1, 2, 3, not true"),
        ("optimizer: {schedule: cosin}", "not 'cosin'; did you mean cosine?"),
        ("data: {train: [1]}", "data.train must be a list of strings, not [1]"),
        ("data: {weights: [1, a]}", "data.weights must be a list of numbers, not [1, 'a']"),
        ("data: {weights: 1}", "data.weights must be a list of numbers, not 1"),
        ("generation: {prompt: 5}", "must be a string, not 5 (quote it to make it a string)"),
        ("model: {egpt: 3}", "model.egpt must be a section of `key: value` lines, not 3"),
        ("deepspeed: 3", "deepspeed must be a mapping, not 3"),
        ("model: {lr: 1.0}", "model.lr is not a key; did you mean optimizer.lr?"),
        ("modle: {}", "modle is not a key; did you mean model?"),
        ("checkpoint: {zzz: 1}", "the keys of checkpoint are directory, interval, keep"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(write, text, expected):
    assert expected in error_of(write(text))


def test_a_key_given_twice_is_refused_with_its_line(write):
    message = error_of(write("model:\n  num_layers: 2\n  num_layers: 3\n"))
    assert "line 3: model.num_layers is given twice" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("model: [1", "run.yaml:1:10: not YAML"), ("- a\n", "not list"), ("a: \0", "not YAML")],
)
def test_what_is_not_a_configuration_is_one_line_with_its_place(write, text, expected):
    message = error_of(write(text))
    assert expected in message
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yaml: no such file" in error_of(tmp_path / "nowhere.yaml")


def test_yaml_cannot_construct_python_objects(write):
    assert "not YAML" in error_of(write("data: !!python/object/apply:os.getcwd []\n"))


def test_overrides_win_over_the_file_and_are_typed(write):
    path = write("model: {num_layers: 3}\n")
    config = load_config(
        path,
        [
            "model.num_layers=5",
            "optimizer.lr=2e-4",
            "model.window=null",
            "data.train=[a, b]",
            "model.egpt.local_attention=true",
            "deepspeed.zero_optimization.reduce_scatter=false",
        ],
    )
    assert config.model.num_layers == 5
    assert config.optimizer.lr == 2e-4
    assert config.data.train == ("a", "b")
    assert config.model.egpt.local_attention is True
    assert config.deepspeed == {"zero_optimization": {"reduce_scatter": False}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" Yes: 1", " Yes: 1"), ("12", "12"), ('"\\n"', "\n"), ("", "")],
)
def test_text_overrides_are_taken_as_they_stand_unless_quoted(write, text, expected):
    assert load_config(write(""), [f"generation.prompt={text}"]).generation.prompt == expected


def test_a_wrong_override_says_that_it_came_from_the_command_line(write):
    message = error_of(write(""), "model.num_layers=x", "model.depth", "optimizer.lr=[")
    assert "model.num_layers must be an integer, not 'x' (command line)" in message
    assert "'model.depth' must have the form section.key=value" in message
    assert "optimizer.lr=[ is not a YAML value" in message


def test_mappings_are_held_to_the_rules_of_a_file(write):
    values = {"model": {"num_layers": 3}, "training": {"steps": 200}}
    overrides = ["model.num_heads=4"]
    path = write("model: {num_layers: 3}\ntraining: {steps: 200}")
    assert config_from_values(values, overrides) == load_config(path, overrides)
    assert values == {"model": {"num_layers": 3}, "training": {"steps": 200}}
    with pytest.raises(ConfigError, match="num_layrs") as found:
        config_from_values({"model": {"num_layrs": 3}, "training": {"steps": "many"}})
    assert "2 problems" in str(found.value)


def test_an_override_below_a_value_is_refused(write):
    message = error_of(write("model: {num_layers: 3}\n"), "model.num_layers.x=1")
    assert "model.num_layers must be an integer, not {'x': 1}" in message


def test_the_resolved_configuration_reads_back_equal(write):
    config = load_config(
        write("model: {num_kv_heads: 4}\ndata: {train: [a]}\noptimizer: {eps: 1e-9}\n"),
        ["generation.prompt=“É”\n", "deepspeed.zero_optimization.reduce_bucket_size=5e7"],
    )
    assert load_config(write(config_to_yaml(config))) == config


def test_a_key_of_earlier_versions_is_read_where_it_did_nothing_and_named_where_it_did(write):
    for value in ("false", "true"):
        path = write(f"model: {{egpt: {{token_counts: {value}, chunk_size: 8}}}}\n")
        if value == "false":
            assert load_config(path).model.egpt.chunk_size == 8
        else:
            assert "model.egpt.token_counts is a key of earlier versions: " in error_of(path)
            assert "token_memory" in error_of(path)
    assert model_config_from_dict({"egpt": {"token_counts": False}}) == ModelConfig()
    with pytest.raises(ConfigError, match=r"egpt\.token_counts is a key of earlier versions"):
        model_config_from_dict({"egpt": {"token_counts": True}})
    original = {"features_per_chunk": 1, "feature_pooling": "last"}
    plain = {"random_history": False, "adapter_norm": False}
    assert model_config_from_dict({"egpt": original | plain}) == ModelConfig()
    for key, value in (("features_per_chunk", 4), ("random_history", True)):
        with pytest.raises(ConfigError, match=rf"egpt\.{key} is a key of earlier versions"):
            model_config_from_dict({"egpt": {key: value}})


def test_a_models_config_json_is_read_back_and_checked():
    config = ModelConfig(kind="egpt", num_kv_heads=2)
    values = config_to_dict(config)
    assert model_config_from_dict(values) == config
    with pytest.raises(ConfigError, match=r"w/config.json: hiden_size is not a key.*hidden_size"):
        model_config_from_dict({**values, "hiden_size": 3}, source="w/config.json")
