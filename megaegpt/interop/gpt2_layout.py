"""Where Hugging Face's GPT-2 has each of our tensors, and the conversion in both directions.

Their linear layers are ``Conv1D``: weights are (in, out), ours transposed. Query, key and value are
one layer, ``c_attn``, side by side in the output dimension. Vocabulary matrices have no padding
rows. The tied head is not stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.errors import CheckpointError
from megaegpt.model.build import meta_model

_EMBEDDING, _HEAD = "wte.weight", "lm_head.weight"
_WRAPPERS = r"^(module\.|_orig_mod\.)*(transformer\.)?"
"""What DistributedDataParallel, ``torch.compile`` and the model with a head put before a name."""
_MASK = r"h\.\d+\.attn\.(bias|masked_bias)"
"""Buffers that old versions saved: the causal mask, and what it puts in the place of scores."""
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    def their_shape(self, ours: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
        """Shape of their tensor, from that of ours."""
        shape = ours[::-1] if self.transposed else ours
        if self.vocabulary:
            shape = (config.vocab_size, *shape[1:])
        return shape if self.part is None else (*shape[:-1], 3 * shape[-1])

    def take(self, theirs: Tensor, config: ModelConfig) -> Tensor:
        """Our tensor out of theirs."""
        if self.part is not None:
            theirs = theirs.chunk(3, dim=-1)[self.part]
        if self.transposed:
            theirs = theirs.t()
        if self.vocabulary:
            theirs = F.pad(theirs, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
        return theirs


def places(config: ModelConfig) -> dict[str, Place]:
    """The place of every parameter of a GPT-2-shaped GPT with biases, by our name."""
    found = {
        "embedding.weight": Place(_EMBEDDING, vocabulary=True),
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
        found["head.weight"] = Place(_HEAD, vocabulary=True)
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

    Every one of theirs is used, or left out for a known reason: causal masks are no weights, and a
    tied head repeats the embedding. A model saved without any bias has biases of 0.

    Raises:
        CheckpointError: one of theirs is missing, has another shape or type than ``config`` says,
            or has no place in a GPT-2.
    """
    theirs = _weights_by_short_name(theirs)
    _check_layers(theirs, config)
    if config.tied_embeddings:
        _untie(theirs)
    needed: dict[str, tuple[int, ...]] = {}
    shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    found = places(config)
    for name, place in found.items():
        needed[place.name] = place.their_shape(shapes[name], config)
    if not any(name.endswith(".bias") for name in theirs):
        biases = {name: shape for name, shape in needed.items() if name.endswith(".bias")}
        theirs |= {name: torch.zeros(shape) for name, shape in biases.items()}
    for name, shape in needed.items():
        _check_tensor(name, theirs.get(name), shape)
    if foreign := sorted(theirs.keys() - needed.keys()):
        listed = ", ".join(name[:80] for name in foreign[:3]) + (" ..." if foreign[3:] else "")
        raise CheckpointError(f"it holds what is no part of this GPT-2: {listed}")
    return {name: place.take(theirs[place.name], config) for name, place in found.items()}


def _weights_by_short_name(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without masks, and without what wrappers put before every name."""
    short: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        key = re.sub(_WRAPPERS, "", name)
        if re.fullmatch(_MASK, key):
            continue
        if key in short:
            raise CheckpointError(f"it holds {key} under two names")
        short[key] = tensor
    return short


def _check_layers(theirs: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Before anything is made for each layer of a configuration, which may say any number."""
    layers = {match[1] for name in theirs if (match := re.match(r"h\.(\d+)\.", name))}
    if len(layers) != config.num_layers:
        raise CheckpointError(f"it holds {len(layers)} layers, n_layer is {config.num_layers}")


def _untie(theirs: dict[str, Tensor]) -> None:
    """Leave a tied pair under the embedding's name alone."""
    head = theirs.pop(_HEAD, None)
    if head is None:
        return
    embedding = theirs.setdefault(_EMBEDDING, head)
    if not torch.equal(embedding, head):
        raise CheckpointError(
            f"{_HEAD} differs from {_EMBEDDING}, though tie_word_embeddings is true: if the head "
            "is meant, set tie_word_embeddings to false"
        )


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise CheckpointError(f"the tensor {name} is missing")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)} in the file, {shape} by its configuration"
        )
    if tensor.dtype not in _TYPES:
        raise CheckpointError(f"{name} is {tensor.dtype}, not fp16, bf16, fp32 or fp64")


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
