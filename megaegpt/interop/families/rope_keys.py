"""Rotary positions in Hugging Face's configurations.

Until version 5 of transformers they are ``rope_theta`` and ``rope_scaling``, since then
``rope_parameters``; either is read, and the first is written, which all versions read.
"""

from __future__ import annotations

import math
from typing import Any

from megaegpt.config import ModelConfig, RopeScalingConfig
from megaegpt.interop.description import Description, shown
from megaegpt.interop.families.family import Concern

_KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}
_OWN_KEYS = {
    "none": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
_EVERY_KIND = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_BASE = 10000.0


def _read(theirs: Description) -> dict[str, Any]:
    scaling = theirs.inside("rope_scaling")
    if not scaling.values:
        scaling = theirs.inside("rope_parameters")
    default = theirs.read("rope_theta", float, _BASE)
    name = scaling.read("rope_type", str, scaling.read("type", str, "default"))
    if name not in _KINDS:
        raise scaling.error(f"rope_type={shown(name)} is none of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    for key, value in scaling.values.items():
        if key not in _EVERY_KIND | _OWN_KEYS[kind] and value is not None:
            raise scaling.error(f"{key}={shown(value)} has no meaning for rope_type={name}")
    for place in (theirs, scaling):
        if (share := place.read("partial_rotary_factor", float, 1.0)) != 1.0:
            raise place.error(f"partial_rotary_factor={share} is not supported, only 1.0")
    return {
        "rope_base": scaling.read("rope_theta", float, default),
        "rope_scaling": _scaling(kind, scaling, theirs),
    }


def _scaling(kind: str, scaling: Description, theirs: Description) -> RopeScalingConfig:
    if kind == "none":
        return RopeScalingConfig()
    values: dict[str, Any] = {"kind": kind, "factor": scaling.need("factor", float)}
    if kind in ("yarn", "llama3"):
        longest = theirs.read("max_position_embeddings", int, None)
        key = "original_max_position_embeddings"
        original = scaling.read(key, int, longest)
        if original is None:
            raise scaling.error(f"{key} is missing")
        values["original_max_seq_len"] = original
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            values[key] = scaling.need(key, float)
    if kind == "yarn":
        if not scaling.read("truncate", bool, True):
            raise scaling.error("truncate=False is not supported, only True")
        values["beta_fast"] = scaling.read("beta_fast", float, None) or 32.0
        values["beta_slow"] = scaling.read("beta_slow", float, None) or 1.0
        values["attention_factor"] = _attention_factor(scaling, values["factor"])
    return RopeScalingConfig(**values)


def _attention_factor(scaling: Description, factor: float) -> float | None:
    given: float | None = scaling.read("attention_factor", float, None)
    scale, scale_all = (scaling.read(key, float, None) for key in ("mscale", "mscale_all_dim"))
    if given is not None or not (scale and scale_all) or factor <= 1:
        return given
    return (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)


def _write(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if (original := config.rope_original_length) is not None:
        written["original_max_position_embeddings"] = int(original)
    if scaling.kind == "llama3":
        written["low_freq_factor"] = scaling.low_freq_factor
        written["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        written |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            written["attention_factor"] = scaling.attention_factor
    return {
        "rope_theta": config.rope_base,
        "rope_scaling": None if scaling.kind == "none" else written,
    }


ROPE = Concern(
    ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"), _read, _write
)
