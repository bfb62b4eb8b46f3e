"""Where another program's files have each of our tensors, and the conversion in both directions.

Linear weights are (out, in) here. Vocabulary matrices have no padding rows there, and a tied head
is not stored.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.errors import CheckpointError
from megaegpt.interop.families import Family
from megaegpt.interop.families.family import Place
from megaegpt.interop.tensor_files import StoredTensor
from megaegpt.model.build import meta_model

_WRAPPERS = r"(module\.|_orig_mod\.)*"
"""Prefixes that DistributedDataParallel and ``torch.compile`` give to names."""
_VOCABULARY = ("embedding.weight", "head.weight")
_PARTS = 3
_TYPES = {f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64")}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One of our tensors and its place in theirs."""

    name: str
    """Their tensor; without the prefix of the model's body, whose use files are not agreed on."""
    place: Place
    shape: Shape
    """Ours."""
    heads: int | None = None
    """Of a query or key weight whose rows are in another order there."""


class TensorLayout:
    """The tensors of one model of a family, in Hugging Face's form or in a GGUF file."""

    def __init__(self, config: ModelConfig, family: Family, *, gguf: bool) -> None:
        if family.zero_biases:
            config = dataclasses.replace(config, bias=True, qkv_bias=None)
        self.config, self.family, self.gguf = config, family, gguf
        self.entries = {
            name: self._entry(name, tuple(parameter.shape))
            for name, parameter in meta_model(config).named_parameters()
        }
        """By our name."""
        self._parts: dict[str, list[str]] = {}
        for ours, entry in self.entries.items():
            self._parts.setdefault(entry.name, []).append(ours)
        self.shapes = {entry.name: self._their_shape(entry) for entry in self.entries.values()}
        """Of their tensors, by their names."""

    def full_name(self, name: str) -> str:
        """The name that is written for one of theirs."""
        place = self.entries[self._parts[name][0]].place
        return self.family.body + name if place.in_body and not self.gguf else name

    def take(self, ours: str, stored: Mapping[str, StoredTensor]) -> Tensor:
        """Our tensor out of theirs, a view of it where nothing has to be copied.

        Biases that no file has are zeros (see :attr:`~Family.zero_biases`).
        """
        entry = self.entries[ours]
        if entry.name not in stored:
            return torch.zeros(entry.shape)
        tensor = stored[entry.name].read()
        if self._is_transposed(entry):
            tensor = tensor.t()
        if entry.place.part is not None:
            tensor = tensor.chunk(_PARTS)[entry.place.part]
        if entry.heads is not None:
            tensor = _halves_from_pairs(tensor, entry.heads)
        return F.pad(tensor, (0, 0, 0, entry.shape[0] - len(tensor))) if _pads(ours) else tensor

    def give(self, theirs: str, read: Callable[[str], Tensor | None]) -> Tensor:
        """Their tensor out of ours; ``read`` gives None for a bias that the model lacks."""
        names = sorted(self._parts[theirs], key=lambda name: self.entries[name].place.part or 0)
        parts = [self._part(name, read(name)) for name in names]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.t() if self._is_transposed(self.entries[names[0]]) else tensor

    def _part(self, name: str, tensor: Tensor | None) -> Tensor:
        entry = self.entries[name]
        if tensor is None:
            return torch.zeros(entry.shape)
        if entry.heads is not None:
            tensor = _pairs_from_halves(tensor, entry.heads)
        return tensor[: self.config.vocab_size] if _pads(name) else tensor

    def _entry(self, ours: str, shape: Shape) -> Entry:
        path, kind = ours.rsplit(".", 1)
        number = re.search(r"\.(\d+)\.", path)
        pattern = path if number is None else path.replace(number[0], ".{n}.", 1)
        place = self.family.places[pattern]
        theirs = place.gguf if self.gguf else place.theirs
        name = f"{theirs if number is None else theirs.format(n=number[1])}.{kind}"
        heads = None
        if self.gguf and self.family.gguf_pairs_rows:
            rotated = {"query": self.config.num_heads, "key": self.config.kv_heads}
            heads = rotated.get(path.rsplit(".", 1)[-1])
        return Entry(name, place, shape, heads)

    def _their_shape(self, entry: Entry) -> Shape:
        rows, *columns = entry.shape
        if entry.place in (self.family.places["embedding"], self.family.places["head"]):
            rows = self.config.vocab_size  # without padding
        shape = (rows if entry.place.part is None else _PARTS * rows, *columns)
        return shape[::-1] if self._is_transposed(entry) else shape

    def _is_transposed(self, entry: Entry) -> bool:
        return entry.place.transposed and not self.gguf and len(entry.shape) == 2


def _pads(ours: str) -> bool:
    return ours in _VOCABULARY


def _halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key layer from llama.cpp's order, in which neighbours are rotated
    together, into ours, in which row i and the one half a head further are.
    """
    pairs = rows.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(rows.shape)


def _pairs_from_halves(rows: Tensor, heads: int) -> Tensor:
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(rows.shape)


# -- what files hold ------------------------------------------------------------------------------


def match_tensors(
    stored: Mapping[str, StoredTensor], config: ModelConfig, family: Family, *, gguf: bool
) -> tuple[TensorLayout, dict[str, StoredTensor]]:
    """The layout of a model, and the files' tensors by the names that it has for them.

    Every tensor of the files is used, or left out for a known reason: buffers are no weights, and
    a tied head repeats the embedding.

    Raises:
        CheckpointError: a tensor is missing, has another shape or type than ``config`` says, or no
            place in the family.
    """
    found = dict(stored) if gguf else _by_short_name(stored, family)
    _check_layers(found, config, family, gguf)
    layout = TensorLayout(config, family, gguf=gguf)
    if config.tied_embeddings:
        _untie(found, family, gguf)
    has_biases = any(name.endswith(".bias") for name in found)
    for name, shape in layout.shapes.items():
        if family.zero_biases and not has_biases and name.endswith(".bias"):
            continue
        _check_tensor(name, found.get(name), shape)
    if foreign := sorted(found.keys() - layout.shapes.keys()):
        listed = ", ".join(name[:80] for name in foreign[:3]) + (" ..." if foreign[3:] else "")
        raise CheckpointError(f"it holds what is no part of this {family.title}: {listed}")
    return layout, found


def _by_short_name(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """Without buffers, and without what wrappers and the model's body put before every name."""
    prefix = re.compile(rf"^{_WRAPPERS}({re.escape(family.body)})?")
    short: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        key = prefix.sub("", name)
        if re.fullmatch(family.buffers, key):
            continue
        if key in short:
            raise CheckpointError(f"it holds {key} under two names")
        short[key] = tensor
    return short


def _check_layers(
    stored: Mapping[str, StoredTensor], config: ModelConfig, family: Family, gguf: bool
) -> None:
    """Before anything is made for each layer of a configuration, which may say any number."""
    place = next(place for path, place in family.places.items() if "{n}" in path)
    before = (place.gguf if gguf else place.theirs).split("{n}")[0]
    pattern = re.compile(rf"{re.escape(before)}(\d+)\.")
    layers = {match[1] for name in stored if (match := pattern.match(name))}
    if len(layers) != config.num_layers:
        key = next(key.theirs for key in family.keys if key.ours == "num_layers")
        if gguf:
            key = next(name for name, theirs in family.gguf_keys.items() if theirs == key)
        raise CheckpointError(f"it holds {len(layers)} layers, {key} is {config.num_layers}")


def _untie(stored: dict[str, StoredTensor], family: Family, gguf: bool) -> None:
    """Leave a tied pair under the embedding's name alone."""
    embedding, head = (
        f"{place.gguf if gguf else place.theirs}.weight"
        for place in (family.places["embedding"], family.places["head"])
    )
    tied = stored.pop(head, None)
    if tied is None:
        return
    kept = stored.setdefault(embedding, tied)
    if kept is not tied and not torch.equal(kept.read(), tied.read()):
        raise CheckpointError(
            f"{head} differs from {embedding}, though tie_word_embeddings is true: if the head "
            "is meant, set tie_word_embeddings to false"
        )


def _check_tensor(name: str, tensor: StoredTensor | None, shape: Shape) -> None:
    if tensor is None:
        raise CheckpointError(f"the tensor {name} is missing")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{name} has shape {tensor.shape} in the file, {shape} by its configuration"
        )
    if tensor.dtype not in _TYPES:
        raise CheckpointError(f"{name} is {tensor.dtype}, not fp16, bf16, fp32 or fp64")
