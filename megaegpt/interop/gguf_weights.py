"""Models in GGUF files: their metadata as one of Hugging Face's configurations, and their tensors,
dequantised by the ``gguf`` package of llama.cpp's authors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaegpt.config import ModelConfig, RopeScalingConfig
from megaegpt.errors import CheckpointError
from megaegpt.gguf_files import GGUFHeader, GGUFTensor
from megaegpt.interop.description import Description, shown
from megaegpt.interop.families import FAMILIES, Family
from megaegpt.interop.tensor_files import StoredTensor
from megaegpt.model.rotary import rotary_frequencies

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of the divisors of Llama 3's rotary frequencies: its scaling has no key of metadata."""
LLAMA3_SCALING: dict[str, float | int] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of every Llama 3.1, 3.2 and 3.3; the factor is the largest one in the tensor."""
_NEEDED = ("embedding_length", "block_count", "attention.head_count", "context_length")
_HEAD_WIDTHS = ("rope.dimension_count", "attention.value_length")
_WITHOUT_EFFECT = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
SCALING_KEYS = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def gguf_package() -> ModuleType:
    """The ``gguf`` package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files need the package gguf: pip install gguf") from None
    return gguf


# -- what the metadata says -----------------------------------------------------------------------


def gguf_family(header: GGUFHeader) -> Family:
    """The family whose architecture a file names.

    Raises:
        CheckpointError: there is no such family here.
    """
    name = header.metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf is not None and family.gguf == name:
            return family
    known = ", ".join(family.gguf for family in FAMILIES if family.gguf is not None)
    raise CheckpointError(
        f"{header.path}: general.architecture={shown(name)} is not supported, only {known}"
    )


def gguf_description(header: GGUFHeader, family: Family) -> Description:
    """A file's metadata in the words of its family's ``config.json``.

    Raises:
        CheckpointError: a key is missing, or means something that is not computed here.
    """
    own = {
        key.removeprefix(f"{family.gguf}."): _decimal(value)
        for key, value in header.metadata.items()
        if key.startswith(f"{family.gguf}.")
    }
    said = Description(own, f"{header.path}: {family.gguf}")
    theirs: dict[str, Any] = {"model_type": family.model_type}
    for key, name in family.gguf_keys.items():
        if key in own:
            theirs[name] = own.pop(key)
    for key in family.gguf_keys:
        needed = key in _NEEDED or key.endswith("epsilon")
        if needed and family.gguf_keys[key] not in theirs:
            raise said.error(f"{key} is missing")
    embedding = header.tensors.get(name := f"{family.places['embedding'].gguf}.weight")
    if embedding is None:
        raise CheckpointError(f"{header.path}: {name} is missing")
    theirs["vocab_size"] = rows = embedding.shape[0]
    if (vocab_size := own.get("vocab_size", rows)) != rows:
        raise said.error(f"vocab_size={shown(vocab_size)}, and the embedding has {rows} rows")
    theirs["tie_word_embeddings"] = f"{family.places['head'].gguf}.weight" not in header.tensors
    if any("mlp_bias" in concern.keys for concern in family.concerns):
        for key, layer in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_up")):
            theirs[key] = f"blk.0.{layer}.bias" in header.tensors
    if "rope.freq_base" in family.gguf_keys:
        theirs["rope_scaling"] = _rope_scaling(header, own, said)
        _check_head_width(own, theirs, said)
    _check_nothing_is_left(own, said)
    return Description(theirs, str(header.path))


def _decimal(value: object) -> object:
    """The shortest decimal of a number in fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(
    header: GGUFHeader, own: dict[str, Any], said: Description
) -> dict[str, Any] | None:
    prefix = "rope.scaling."
    factor: float | None = said.read(f"{prefix}factor", float, None)
    strength: float | None = said.read(f"{prefix}attn_factor", float, None)
    own.pop(f"{prefix}attn_factor", None)
    scaling = {name: own.pop(prefix + key, None) for key, name in SCALING_KEYS.items()}
    scaling = {name: value for name, value in scaling.items() if value is not None}
    if ROPE_FACTORS in header.tensors:
        if scaling:
            raise said.error(f"rope.scaling beside the tensor {ROPE_FACTORS} is not supported")
        return {"rope_type": "llama3", **LLAMA3_SCALING, "factor": _llama3_factor(header)}
    if factor:  # without a type llama.cpp takes it for linear
        scaling.setdefault("rope_type", "linear")
    kind = scaling.get("rope_type", "none")
    if strength not in (None, 1.0) and kind != "yarn":
        raise said.error(f"{prefix}attn_factor={strength} is for {prefix}type=yarn alone")
    if kind == "none":
        return None
    if strength is not None and kind == "yarn":  # of what YaRN itself has
        if factor is None or factor <= 0:
            raise said.error(f"{prefix}factor={shown(factor)} must be greater than 0")
        scaling["attention_factor"] = strength * (0.1 * math.log(factor) + 1)
    return scaling


def llama3_factors(config: ModelConfig) -> Tensor:
    """Return Llama 3's divisor of each rotary frequency in fp32, (rotated columns / 2,)."""
    device = torch.device("cpu")
    plain = dataclasses.replace(config, rope_scaling=RopeScalingConfig())
    return (rotary_frequencies(plain, device) / rotary_frequencies(config, device)).float()


def _llama3_factor(header: GGUFHeader) -> float:
    factors = read_tensor(header, header.tensors[ROPE_FACTORS])
    return float(factors.max())


def _check_head_width(own: dict[str, Any], theirs: dict[str, Any], said: Description) -> None:
    """Keys and values must have the same width, and all of it must be rotated."""
    said_widths = {key: own.pop(key, None) for key in _HEAD_WIDTHS}
    heads, width = theirs["num_attention_heads"], theirs["hidden_size"]
    if type(heads) is not int or type(width) is not int or heads <= 0:
        return  # which is said where all types are checked
    head = theirs.get("head_dim", width // heads)
    for key, value in said_widths.items():
        if value not in (None, head):
            raise said.error(f"{key}={shown(value)} is not supported, only {head}")


def _check_nothing_is_left(own: dict[str, Any], said: Description) -> None:
    for key, value in own.items():
        if key not in _WITHOUT_EFFECT and value not in (0, False, "", "none"):
            raise said.error(f"{key}={shown(value)} is not supported")


# -- its tensors ----------------------------------------------------------------------------------


def gguf_tensors(header: GGUFHeader) -> dict[str, StoredTensor]:
    """A file's tensors by name, in fp32, none of them read yet.

    Raises:
        CheckpointError: one has a quantisation that the ``gguf`` package does not read, or is not
            in the file to its end.
    """
    for tensor in header.tensors.values():
        _check_is_read(header, tensor)
    return {
        name: StoredTensor(
            tensor.shape, "torch.float32", functools.partial(read_tensor, header, tensor)
        )
        for name, tensor in header.tensors.items()
        if name != ROPE_FACTORS
    }


def read_tensor(header: GGUFHeader, tensor: GGUFTensor) -> Tensor:
    """One tensor's values in fp32.

    Raises:
        CheckpointError: as :func:`gguf_tensors`.
    """
    _check_is_read(header, tensor)
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(tensor.type_number)
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    data = np.memmap(header.path, np.uint8, "r", tensor.offset, shape)
    values = gguf.dequantize(data, kind).reshape(tensor.shape)
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _check_is_read(header: GGUFHeader, tensor: GGUFTensor) -> None:
    gguf = gguf_package()
    where = f"{header.path}: {tensor.name[:80]}"
    try:
        kind = gguf.GGMLQuantizationType(tensor.type_number)
    except ValueError:
        raise CheckpointError(
            f"{where} is of ggml's type {tensor.type_number}, which the installed gguf package "
            "does not know"
        ) from None
    if not _is_dequantised(tensor.type_number):
        raise CheckpointError(f"{where} is {kind.name}, which the gguf package does not dequantise")
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise CheckpointError(
            f"{where} has rows of {tensor.shape[-1]}, {kind.name} has blocks of {block}"
        )
    end = tensor.offset + math.prod(tensor.shape) // block * size
    if end > header.size:
        raise CheckpointError(
            f"{where} ends at byte {end:,}, the file has {header.size:,}: it is cut short"
        )


@functools.cache
def _is_dequantised(type_number: int) -> bool:
    """Whether the package turns blocks of a type into numbers: tried with one of zeros."""
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(type_number)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
