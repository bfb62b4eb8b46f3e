"""How ``training.freeze`` names the parts of a model."""

from __future__ import annotations

import re

_LAYERS = re.compile(r"layers:(\d+)(?:-(\d+))?")


def parse_part(text: str) -> list[str]:
    """``layers:0-2`` is the parts layers:0, layers:1 and layers:2; any other name is itself."""
    match = _LAYERS.fullmatch(text)
    if match is None:
        return [text]
    first = int(match[1])
    return [f"layers:{n}" for n in range(first, int(match[2] or first) + 1)]


def part_problem(text: str, num_layers: int | None) -> str | None:
    """Describe the mistake in an entry, None if there is none; whether the model has a part of that
    name is checked when it is built, and here whether it has the layer, if their number is known.
    """
    if not text.startswith("layer"):
        return None
    match = _LAYERS.fullmatch(text)
    if match is None:
        return f"{text!r} is none of layers:N and layers:FIRST-LAST"
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        return f"{text!r}: the first layer comes after the last"
    if num_layers is not None and last >= num_layers:
        return f"{text!r}: the model has layers 0 to {num_layers - 1}"
    return None
