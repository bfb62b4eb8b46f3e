"""The parts of a model by name: what can be frozen, what gradient norms are reported by, and which
matrices Muon steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from megaegpt.config.freezing import parse_part
from megaegpt.errors import ConfigError
from megaegpt.parallel.layers import Linear

_BLOCK = re.compile(r"stack\.blocks\.(\d+)\.")
_EMBEDDINGS = ("embedding", "positions", "chunk_positions", "lengths")


def part_of(parameter: str) -> str:
    """The part that a parameter belongs to, by its name in the model.

    >>> part_of("stack.blocks.3.mlp.up.weight"), part_of("positions.table.weight")
    ('layers:3', 'embeddings')
    """
    if match := _BLOCK.match(parameter):
        return f"layers:{match[1]}"
    first = parameter.removeprefix("stack.").split(".")[0]
    return "embeddings" if first in _EMBEDDINGS else first


def parts_of(model: nn.Module) -> list[str]:
    """Every part, in the order of the model; a tied head is part of the embeddings."""
    return list(dict.fromkeys(part_of(name) for name, _ in model.named_parameters()))


def freeze(model: nn.Module, wanted: Sequence[str]) -> int:
    """Keep the parameters of parts as they are: they get no gradient and no optimizer state.

    Args:
        wanted: ``training.freeze``.

    Returns:
        Parameters of this rank that were frozen.

    Raises:
        ConfigError: the model has no such part, or nothing would be left to train.
    """
    parts = parts_of(model)
    chosen = {name for text in wanted for name in parse_part(text)}
    if unknown := sorted(chosen - set(parts)):
        raise ConfigError(
            f"training.freeze: this model has no {unknown[0]} of its own; it has {', '.join(parts)}"
        )
    if chosen and chosen == set(parts):
        raise ConfigError("training.freeze names every part of the model: nothing is left to train")
    frozen = [p for name, p in model.named_parameters() if part_of(name) in chosen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)


def matrices_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable weights of linear layers, in blocks and before them, by name: what Muon is for.
    Not among them are embeddings, a head, and the small projections of EGPT's memories.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module.weight.requires_grad
    }
