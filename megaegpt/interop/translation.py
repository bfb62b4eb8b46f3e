"""Other programs' configurations of a model as ours, and ours as theirs: by families' tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megaegpt.config import ModelConfig, RopeScalingConfig
from megaegpt.config.model_rules import has_effect
from megaegpt.config.validation import validate_model
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.interop.description import Description, shown
from megaegpt.interop.families import FAMILIES, Family
from megaegpt.json_files import read_json

CONFIG = "config.json"
_NOT_COMPUTED = {"dropout", "init_std", "z_loss", "document_end"}
"""Ours that a trained model's output on one text does not depend on."""


def read_description(folder: Path) -> Description:
    """Read a folder's ``config.json``.

    Raises:
        CheckpointError: it is missing, damaged, or no JSON object.
    """
    return Description(
        read_json(folder / CONFIG, dict[str, Any], error=CheckpointError), str(folder / CONFIG)
    )


def is_huggingface_folder(folder: Path) -> bool:
    """Whether the folder describes a model in Hugging Face's form (of whatever architecture)."""
    try:
        return "model_type" in read_description(folder)
    except CheckpointError:
        return False


def family_of(theirs: Description) -> Family:
    """The family that a ``config.json`` of theirs names.

    Raises:
        CheckpointError: there is no such family here.
    """
    if "model_type" not in theirs:
        raise CheckpointError(
            f"{theirs.source} describes no model in Hugging Face's form: no model_type"
        )
    name = theirs.values["model_type"]
    for family in FAMILIES:
        if family.model_type == name:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise theirs.error(f"model_type={shown(name)} is not supported, only {known}")


def to_ours(theirs: Description, family: Family) -> ModelConfig:
    """Our configuration of the model that a description of ``family`` means.

    Raises:
        CheckpointError: it computes something else, has values of other types, or keys of which
            it is not known what they mean.
    """
    _check_keys(theirs, family)
    config = _translate(theirs, family)
    try:
        validate_model(config, theirs.source)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return config


def _translate(theirs: Description, family: Family) -> ModelConfig:
    values = dict(family.constants)
    for key in family.keys:
        values[key.ours] = theirs.read(
            key.theirs, key.kind, key.default, key.other, nullable=key.nullable
        )
    for concern in family.concerns:
        values |= concern.read(theirs)
    return ModelConfig(**values)


def _check_keys(theirs: Description, family: Family) -> None:
    for key, allowed in family.fixed.items():
        if (value := theirs.values.get(key, allowed[0])) not in allowed:
            raise theirs.error(f"{key}={shown(value)} is not supported, only {allowed[0]}")
    known = family.ignored | family.fixed.keys()
    known |= {name for key in family.keys for name in (key.theirs, key.other)}
    known |= {name for concern in family.concerns for name in concern.keys}
    for key, value in theirs.values.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise theirs.error(
                f"{shown(key)}={shown(value)} is not known to {family.title}: remove it if the "
                "model computes the same without it"
            )


def to_theirs(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The ``config.json`` of a model of ours that ``family`` computes (see :func:`differences`)."""
    config = _resolved(config)
    written: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    written |= {key.theirs: getattr(config, key.ours) for key in family.keys}
    for concern in family.concerns:
        written |= concern.write(config)
    return written


def differences(config: ModelConfig, family: Family) -> list[str]:
    """Return the reasons why ``family`` cannot compute a model of ours; none: it can."""
    if config.kind != "gpt":
        return [f"kind={config.kind}"]
    theirs = _translate(Description(to_theirs(config, family), family.title), family)
    wanted, found = _resolved(config), _resolved(theirs)
    skipped = _NOT_COMPUTED | ({"bias", "qkv_bias"} if family.zero_biases else set())
    return [
        f"{field.name}={getattr(wanted, field.name)}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in skipped
        and has_effect(wanted, field.name)
        and getattr(wanted, field.name) != getattr(found, field.name)
    ]


def lack(family: Family, differences: list[str]) -> str:
    """A clause about :func:`differences` from the family that comes nearest."""
    if any(text.startswith("kind=") for text in differences):  # and it comes no nearer than others
        return f"no family has {', '.join(differences)}"
    return f"{family.title} has no {', '.join(differences)}"


def nearest_family(config: ModelConfig) -> tuple[Family, list[str]]:
    """The family that computes a model of ours, or comes nearest to it, and what it lacks."""
    found = [(family, differences(config, family)) for family in FAMILIES]
    return min(found, key=lambda pair: len(pair[1]))


def _resolved(config: ModelConfig) -> ModelConfig:
    """The same model with its defaults spelled out."""
    scaling = config.rope_scaling
    base = config.rope_base
    if scaling.kind == "ntk":  # nothing but a larger base
        base *= scaling.factor ** (config.rope_size / max(config.rope_size - 2, 1))
        scaling = RopeScalingConfig()
    elif (original := config.rope_original_length) is not None and original.is_integer():
        scaling = dataclasses.replace(scaling, original_max_seq_len=int(original))
    return dataclasses.replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_size,
        ffn_hidden_size=config.ffn_size,
        qkv_bias=config.has_qkv_bias,
        rope_base=base,
        rope_scaling=scaling,
    )
