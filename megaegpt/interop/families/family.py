"""The description of a family of models as data: its configuration's keys, and the names of its
tensors.

A family is described once, by :class:`Family`; :mod:`megaegpt.interop.translation` turns its
configurations into ours and back, :mod:`megaegpt.interop.tensor_layout` its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megaegpt.config import ModelConfig
from megaegpt.interop.description import Description


@dataclass(frozen=True)
class Key:
    """A key of theirs whose value is one of ours."""

    theirs: str
    ours: str
    default: int | float | bool | None
    """The value that transformers takes where a file has none."""
    kind: type = int
    other: str = ""
    """Another name under which transformers reads the same value."""
    nullable: bool = False
    """null means None in ours, even where the default is another."""


@dataclass(frozen=True)
class Concern:
    """Keys of theirs that say together what several of ours say."""

    keys: tuple[str, ...]
    read: Callable[[Description], dict[str, Any]]
    """Our values, by our keys."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Theirs, by their keys."""


@dataclass(frozen=True)
class Place:
    """Which of their layers is one of our layers; ``{n}`` stands for the block's number."""

    theirs: str
    """In Hugging Face's form, without the prefix of the model's body."""
    gguf: str
    """In a GGUF file."""
    transposed: bool = False
    """Hugging Face's weight is (in, out): a ``Conv1D``."""
    part: int | None = None
    """Which of three, side by side in their output dimension: query, key and value."""
    in_body: bool = True
    """Named with the prefix of the model's body."""


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's."""

    title: str
    model_type: str
    architecture: str
    """Their class of the model with its head."""
    body: str
    """Prefix of all tensors but the head's."""
    gguf: str | None
    """``general.architecture`` of its GGUF files, if llama.cpp computes it."""
    constants: Mapping[str, Any]
    """Values of our configuration that all its models have, if they are not our defaults."""
    keys: tuple[Key, ...]
    concerns: tuple[Concern, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    """Values that we compute, of keys that decide the arithmetic; the first is their default."""
    ignored: frozenset[str]
    """Keys that do not change what a trained model computes."""
    places: Mapping[str, Place]
    """By the path of our layer."""
    gguf_keys: Mapping[str, str]
    """Their keys by those of a GGUF file, which begin with its architecture."""
    buffers: str = r"(?!)"
    """Pattern of names of stored tensors that are no weights."""
    zero_biases: bool = False
    """Its layers have biases; a model saved without any has biases of 0."""
    gguf_pairs_rows: bool = False
    """llama.cpp rotates neighbouring columns, so query and key rows are in another order there."""

    def __str__(self) -> str:
        """One of its models, with its article."""
        return f"{'an' if self.title[0] in 'AEIO' else 'a'} {self.title}"
