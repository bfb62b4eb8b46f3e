"""Sliding windows in Hugging Face's configurations: one for every layer, or by layer."""

from __future__ import annotations

from typing import Any

from megaegpt.config import ModelConfig
from megaegpt.interop.description import Description, shown
from megaegpt.interop.families.family import Concern, Key

_GLOBAL, _SLIDING = "full_attention", "sliding_attention"

EVERY_LAYER = Key("sliding_window", "window", 4096, nullable=True)
"""Mistral: a token sees itself and the ones before it, so many together; null: all of them."""


def _read(theirs: Description) -> dict[str, Any]:
    layers = theirs.read("num_hidden_layers", int, 32)
    size = theirs.read("sliding_window", int, 4096, nullable=True)
    used = theirs.read("use_sliding_window", bool, False)
    first = theirs.read("max_window_layers", int, 28)
    kinds = theirs.values.get("layer_types")
    if kinds is None:
        if not used or size is None or first >= layers:
            return {}
        if first > 0:
            raise theirs.error(
                f"max_window_layers={first} of {layers} layers without a window cannot be "
                "expressed: every n-th layer is without one here, or none"
            )
        return {"window": size}
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {_GLOBAL, _SLIDING}:
        raise theirs.error(f"layer_types={shown(kinds)} is no list of {_GLOBAL} and {_SLIDING}")
    if len(kinds) != layers:
        raise theirs.error(f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}")
    if _SLIDING not in kinds:
        return {}
    if not used or size is None:
        raise theirs.error(f"layer_types has {_SLIDING}, but there is no sliding_window in use")
    if _GLOBAL not in kinds:
        return {"window": size}
    every = kinds.index(_GLOBAL) + 1
    if kinds != _kinds(layers, every):
        raise theirs.error(
            "layer_types without a window where every n-th layer is, or none, cannot be expressed"
        )
    return {"window": size, "window_every": every}


def _kinds(layers: int, every: int | None) -> list[str]:
    return [_SLIDING if every is None or (n + 1) % every else _GLOBAL for n in range(layers)]


def _write(config: ModelConfig) -> dict[str, Any]:
    used = config.window is not None
    kinds = _kinds(config.num_layers, config.window_every)
    return {
        "use_sliding_window": used,
        "sliding_window": config.window,
        "max_window_layers": 0 if used else config.num_layers,
        "layer_types": kinds if used else [_GLOBAL] * config.num_layers,
    }


BY_LAYER = Concern(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _read, _write
)
"""Qwen 2 and 3."""
