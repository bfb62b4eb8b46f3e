"""Models by name, as starting points: the sizes of GPT-2 and models of Llama's family."""

from __future__ import annotations

import difflib
from typing import Any

from megaegpt.config.model import ModelConfig
from megaegpt.config.parsing import Problem, parse_section, raise_problems
from megaegpt.config.validation import validate_model
from megaegpt.errors import ConfigError

_LLAMA: dict[str, Any] = {
    "positions": "rotary",
    "bias": False,
    "norm": "rms_norm",
    "mlp": "swiglu",
    "tied_embeddings": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-small (124M)": {"num_layers": 12, "num_heads": 12, "hidden_size": 768},
    "gpt2-medium (355M)": {"num_layers": 24, "num_heads": 16, "hidden_size": 1024},
    "gpt2-large (774M)": {"num_layers": 36, "num_heads": 20, "hidden_size": 1280},
    "gpt2-xl (1558M)": {"num_layers": 48, "num_heads": 25, "hidden_size": 1600},
    "llama-160m": _LLAMA
    | {
        "vocab_size": 32_000,
        "max_seq_len": 2048,
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "ffn_hidden_size": 3072,
        "layer_norm_eps": 1e-6,
    },
    "smollm2-135m": _LLAMA
    | {
        "vocab_size": 49_152,
        "max_seq_len": 8192,
        "hidden_size": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "ffn_hidden_size": 1536,
        "rope_base": 100_000.0,
        "tied_embeddings": True,
    },
    "qwen3-0.6b": _LLAMA
    | {
        "vocab_size": 151_936,
        "max_seq_len": 4096,
        "hidden_size": 1024,
        "num_layers": 28,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_hidden_size": 3072,
        "rope_base": 1_000_000.0,
        "qk_norm": "head",
        "tied_embeddings": True,
        "layer_norm_eps": 1e-6,
    },
    "mistral-7b": _LLAMA
    | {
        "vocab_size": 32_000,
        "max_seq_len": 8192,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_hidden_size": 14_336,
        "window": 4096,
    },
    "llama3-8b": _LLAMA
    | {
        "vocab_size": 128_256,
        "max_seq_len": 8192,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "ffn_hidden_size": 14_336,
        "rope_base": 500_000.0,
        "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192},
    },
}
"""Fields by full name (GPT-2's are in Radford et al. 2019, table 2); the others have
:class:`ModelConfig`'s defaults."""

ALIASES = {name.split(" ", 1)[0]: name for name in PRESETS if name.startswith("gpt2")} | {
    "gpt2": "gpt2-small (124M)"
}
"""Short names: gpt2, gpt2-small, gpt2-medium, gpt2-large, gpt2-xl."""


def create_model_config(name: str, **overrides: Any) -> ModelConfig:
    """A known model, with any field of :class:`ModelConfig` replaced.

    Args:
        name: ``"gpt2-medium (355M)"`` or its short form ``"gpt2-medium"``, or ``"llama3-8b"``.
        overrides: fields, nested ones as dicts: ``num_kv_heads=4, egpt={"chunk_size": 512}``.

    Raises:
        ConfigError: an unknown name (the closest one is named), field, type or combination.

    Example:
        >>> create_model_config("gpt2-small (124M)", num_kv_heads=4).kv_heads
        4
    """
    sizes = PRESETS.get(ALIASES.get(name, name))
    if sizes is None:
        known = [*PRESETS, *ALIASES]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(PRESETS)}"
        raise ConfigError(f"there is no model {name!r}; {hint}")
    problems: list[Problem] = []
    config = parse_section(ModelConfig, {**sizes, **overrides}, "", problems)
    raise_problems(name, problems)
    validate_model(config, name)
    return config
