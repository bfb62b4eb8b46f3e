"""Groups of parameters in a configuration, and which names belong to each."""

from __future__ import annotations

import dataclasses

import pytest

from megaegpt.config.loading import config_from_values, config_to_yaml
from megaegpt.config.parameter_groups import ParameterGroup, assign_groups
from megaegpt.config.yaml_text import parse_yaml
from megaegpt.errors import ConfigError

NAMES = ["embedding.weight", "blocks.0.up.weight", "blocks.0.up.bias", "norm.bias"]


def test_the_first_entry_that_matches_a_name_has_it() -> None:
    groups = [ParameterGroup("*.bias"), ParameterGroup("blocks.*"), ParameterGroup("norm*", 2.0)]
    with pytest.raises(ConfigError, match=r"groups\[2\]\.match: earlier entries match all"):
        assign_groups(NAMES, groups)
    assert assign_groups(NAMES, groups[:2]) == [NAMES[2:], [NAMES[1]], [NAMES[0]]]
    assert assign_groups(NAMES, []) == [NAMES]


def test_a_pattern_that_matches_nothing_is_told_with_names_like_it() -> None:
    with pytest.raises(ConfigError) as raised:
        assign_groups(NAMES, [ParameterGroup("embeddings.weight")])
    text = str(raised.value)
    assert "'embeddings.weight' matches no trainable parameter" in text
    assert "embedding.weight" in text
    assert "\n" not in text


def test_a_configuration_gives_them_as_a_list_and_reads_back_what_it_writes() -> None:
    entries = [{"match": "*.bias", "weight_decay": 0.5}, {"match": "norm.*", "lr_scale": 2}]
    config = config_from_values({"optimizer": {"groups": entries}})
    assert config.optimizer.groups == (
        ParameterGroup("*.bias", weight_decay=0.5),
        ParameterGroup("norm.*", lr_scale=2.0),
    )
    values, _ = parse_yaml(config_to_yaml(config))
    assert config_from_values(values) == config
    other = config_from_values({}, ["optimizer.groups=[{match: '*.bias', weight_decay: 0.5}]"])
    assert other == dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, groups=config.optimizer.groups[:1])
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{}], "optimizer.groups[0].match is missing"),
        ([{"match": "*"}, {"match": "*", "lr_scale": 0}], "groups[1].lr_scale=0.0 must be greater"),
        ([{"match": "*", "weight_decay": -1}], "groups[0].weight_decay=-1.0 must not be negative"),
        ([{"match": "*", "scale": 2}], "optimizer.groups[0].scale is not a key"),
        ([{"match": "*", "lr_scal": 2}], "did you mean optimizer.groups[0].lr_scale?"),
        ([{"match": 3}], "optimizer.groups[0].match must be a string"),
        (["*.bias"], "optimizer.groups[0] must be a section of `key: value` lines"),
        ({"match": "*"}, "must be a list of {match, lr_scale, weight_decay}"),
        ("*.bias", "must be a list of {match, lr_scale, weight_decay}"),
    ],
)
def test_what_is_wrong_with_an_entry_is_told_by_its_number(groups: object, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_from_values({"optimizer": {"groups": groups}})
    assert message in str(raised.value)
