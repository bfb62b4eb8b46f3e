"""Which keys of a model decide what it computes from its weights, and how two models differ in it.

Most of it shows in no tensor's shape: trained weights mean nothing under another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megaegpt.config.model import ModelConfig
from megaegpt.config.model_rules import has_effect
from megaegpt.config.removed_keys import is_unused

ARITHMETIC_KEYS = {
    "model": "kind vocab_size hidden_size num_layers num_heads num_kv_heads head_dim "
    "ffn_hidden_size attention positions rope_base rope_fraction rope_pairs window "
    "window_every latent_dim query_latent_dim latent_norm rope_head_dim document_end bias "
    "qkv_bias qk_norm norm norm_placement mlp activation tied_embeddings logit_softcap "
    "layer_norm_eps",
    "model.rope_scaling": "kind factor original_max_seq_len low_freq_factor high_freq_factor "
    "beta_fast beta_slow attention_factor",
    "model.egpt": "chunk_size local_attention attention_sink "
    "memory_gate history token_memory memory_dim memory_pointers memory_chunks "
    "adapter_residual",
    "model.encoder": "layers overlap",
}
"""By section of a run's configuration."""

RESOLVED = {
    "num_kv_heads": "kv_heads",
    "head_dim": "head_size",
    "ffn_hidden_size": "ffn_size",
    "qkv_bias": "has_qkv_bias",
    "latent_dim": "latent_size",
}
"""Keys whose default follows from others, and the property that resolves it."""

_ORIGINAL_LENGTH = "rope_scaling.original_max_seq_len"
_COMPUTED = {**RESOLVED, _ORIGINAL_LENGTH: "rope_original_length"}
"""And a key whose default follows from one that else decides no arithmetic."""

DIGEST_VERSION = "2:"
"""Prefix of digests. Those of version 1, which begin with nothing, changed with every key
that was added, and cannot be compared."""


def model_arithmetic(model: ModelConfig) -> dict[str, Any]:
    """Return the values that decide a model's arithmetic, by key: defaults resolved, without what
    has no effect in such a model. Equal for two models that compute the same from the same weights.
    """
    names = [
        f"{section}.{name}".partition(".")[2]
        for section, names in ARITHMETIC_KEYS.items()
        for name in names.split()
    ]
    return {
        f"model.{name}": _value(model, _COMPUTED.get(name, name))
        for name in names
        if has_effect(model, name)
    }


def arithmetic_differences(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Keys in which two values of :func:`model_arithmetic` differ, one of which may have been kept
    by an earlier version: (there, here).

    A key that is not ``there`` came later, or had no effect: then it had its default.
    """
    usual = ModelConfig()
    defaults = {
        key: value if (name := _name(key)) in RESOLVED else _value(usual, name)
        for key, value in here.items()
    }
    kept = {key: value for key, value in there.items() if not is_unused(key, value)}
    if kept.get(original := f"model.{_ORIGINAL_LENGTH}") is None:  # not resolved, once
        kept[original] = here.get(original)
    there = {**defaults, **kept}
    return {key: (there[key], here.get(key)) for key in there if there[key] != here.get(key)}


def arithmetic_digest(model: ModelConfig) -> str:
    """One text that changes with :func:`model_arithmetic`, and not when a key is added."""
    values = model_arithmetic(model)
    unusual = {key: value for key, value in values.items() if value != _usual(model, key)}
    content = json.dumps(unusual, sort_keys=True)
    return DIGEST_VERSION + hashlib.sha256(content.encode()).hexdigest()


def _usual(model: ModelConfig, key: str) -> Any:
    """Return the value that ``model`` would have without a key."""
    name = _name(key)
    if name in RESOLVED:
        unsaid: dict[str, Any] = {name: None}
        return _value(dataclasses.replace(model, **unsaid), RESOLVED[name])
    return _value(ModelConfig(), _COMPUTED.get(name, name))


def _name(key: str) -> str:
    return key.removeprefix("model.")


def _value(model: ModelConfig, name: str) -> Any:
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value
