"""Models by name: the four sizes of GPT-2 (Radford et al. 2019, table 2), as starting points."""

from __future__ import annotations

import difflib
from typing import Any

from megaegpt.config.model import ModelConfig
from megaegpt.config.parsing import Problem, parse_section, raise_problems
from megaegpt.config.validation import validate_model
from megaegpt.errors import ConfigError

PRESETS: dict[str, dict[str, int]] = {
    "gpt2-small (124M)": {"num_layers": 12, "num_heads": 12, "hidden_size": 768},
    "gpt2-medium (355M)": {"num_layers": 24, "num_heads": 16, "hidden_size": 1024},
    "gpt2-large (774M)": {"num_layers": 36, "num_heads": 20, "hidden_size": 1280},
    "gpt2-xl (1558M)": {"num_layers": 48, "num_heads": 25, "hidden_size": 1600},
}
"""Sizes by full name; everything else about them is :class:`ModelConfig`'s defaults."""

ALIASES = {name.split(" ", 1)[0]: name for name in PRESETS} | {"gpt2": "gpt2-small (124M)"}
"""Short names: gpt2, gpt2-small, gpt2-medium, gpt2-large, gpt2-xl."""


def create_model_config(name: str, **overrides: Any) -> ModelConfig:
    """A model of a known size, with any field of :class:`ModelConfig` replaced.

    Args:
        name: ``"gpt2-medium (355M)"`` or its short form ``"gpt2-medium"``.
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
