"""Where Hugging Face's GPT-2 has each of our tensors, and the conversion in both directions.

Their linear layers are ``Conv1D``: weights are (in, out), ours transposed. Query, key and value are
one layer, ``c_attn``, side by side in the output dimension. Vocabulary matrices have no padding
rows. The tied head is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where their files have one of our tensors."""

    name: str
    """Their tensor, without the leading ``transformer.``."""
    transposed: bool = False
    """A Conv1D weight."""
    part: int | None = None
    """Which of the three in ``c_attn``."""
    vocabulary: bool = False
    """One row a token, to which we add padding rows."""


def places(config: ModelConfig) -> dict[str, Place]:
    """The place of every parameter of a GPT-2-shaped GPT with biases, by our name."""
    found = {
        "embedding.weight": Place("wte.weight", vocabulary=True),
        "positions.table.weight": Place("wpe.weight"),
    }
    for n in range(config.num_layers):
        ours, theirs = f"stack.blocks.{n}", f"h.{n}"
        found |= _norm(f"{ours}.attention_norm", f"{theirs}.ln_1")
        for part, kind in enumerate(("query", "key", "value")):
            found |= _linear(f"{ours}.attention.{kind}", f"{theirs}.attn.c_attn", part)
        found |= _linear(f"{ours}.attention.output", f"{theirs}.attn.c_proj")
        found |= _norm(f"{ours}.mlp_norm", f"{theirs}.ln_2")
        found |= _linear(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc")
        found |= _linear(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj")
    found |= _norm("stack.norm", "ln_f")
    if not config.tied_embeddings:
        found["head.weight"] = Place("lm_head.weight", vocabulary=True)
    return found


def _norm(ours: str, theirs: str) -> dict[str, Place]:
    return {f"{ours}.{kind}": Place(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def _linear(ours: str, theirs: str, part: int | None = None) -> dict[str, Place]:
    return {
        f"{ours}.weight": Place(f"{theirs}.weight", transposed=True, part=part),
        f"{ours}.bias": Place(f"{theirs}.bias", part=part),
    }


def from_theirs(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors by name, views of theirs where nothing has to be copied.

    Raises:
        CheckpointError: one of theirs is missing.
    """
    ours = {}
    for name, place in places(config).items():
        if place.name not in theirs:
            raise CheckpointError(f"the tensor {place.name} is missing")
        tensor = theirs[place.name]
        if place.part is not None:
            tensor = tensor.chunk(3, dim=-1)[place.part]
        if place.transposed:
            tensor = tensor.t()
        if place.vocabulary:
            tensor = F.pad(tensor, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
        ours[name] = tensor
    return ours


def to_theirs(ours: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their tensors by name; biases that the model does not have are zeros."""
    parts: dict[str, list[Tensor]] = {}
    for name, place in places(config).items():
        if name in ours:
            tensor = ours[name]
        else:  # a bias: of as many values as its weight has rows
            tensor = torch.zeros(len(ours[name.removesuffix("bias") + "weight"]))
        if place.vocabulary:
            tensor = tensor[: config.vocab_size]
        parts.setdefault(place.name, []).append(tensor.t() if place.transposed else tensor)
    return {name: torch.cat(tensors, dim=-1) for name, tensors in parts.items()}
