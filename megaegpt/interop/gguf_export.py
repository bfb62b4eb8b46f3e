"""Models of ours, with their tokenizers, as GGUF files, for llama.cpp and what is built on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaegpt.config import ModelConfig
from megaegpt.data.tokenizer import whole_characters
from megaegpt.data.tokenizers.gguf_vocabulary import gguf_vocabulary
from megaegpt.errors import CheckpointError
from megaegpt.files import whole_file
from megaegpt.interop.export import open_ours
from megaegpt.interop.families import FAMILIES, Family
from megaegpt.interop.gguf_weights import (
    ROPE_FACTORS,
    SCALING_KEYS,
    gguf_package,
    llama3_factors,
)
from megaegpt.interop.tensor_layout import TensorLayout
from megaegpt.interop.tensor_writer import narrowed
from megaegpt.interop.translation import differences, lack, to_theirs
from megaegpt.interop.vocabulary_files import tokenizer_beside, tuned_template
from megaegpt.model.weights import read_weights_config, verify_weights

_TYPES = {torch.float32: np.float32, torch.float16: np.float16}


def export_gguf(
    weights: str | Path, output: str | Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write a model of ours and its tokenizer as a GGUF file; one tensor at a time is in memory.

    A tokenizer that the file cannot hold, or none, is said in a line: llama.cpp computes such a
    file from token ids alone.

    Args:
        output: the file.
        dtype: fp32 or fp16, of matrices; vectors are fp32, as llama.cpp wants them.

    Raises:
        CheckpointError: llama.cpp does not compute the model, the weights are damaged or not
            finite, ``output`` exists or cannot be written, or the package ``gguf`` is missing.
        DataError: the chat template beside the weights cannot be read.
    """
    weights, output = Path(weights), Path(output)
    if dtype not in _TYPES:
        raise CheckpointError(f"{output}: a GGUF file is written in fp32 or fp16, not in {dtype}")
    config, extra = read_weights_config(weights)
    family = _family_of(config, weights)
    gguf = gguf_package()
    if output.exists():
        raise CheckpointError(f"{output} exists already: remove it, or name another file")
    verify_weights(weights)
    layout = TensorLayout(config, family, gguf=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open_ours(weights, config) as read, whole_file(output) as temporary:
            writer = gguf.GGUFWriter(temporary, family.gguf)
            _add_metadata(writer, config, family)
            _add(writer, "general.name", output.stem)
            writer.add_file_type(int(dtype == torch.float16))  # of ggml's: all F32, mostly F16
            for key, value in _vocabulary(weights, config, extra).items():
                _add(writer, key, value)
            vectors = {}
            if config.rope_scaling.kind == "llama3":
                vectors[ROPE_FACTORS] = llama3_factors(config).numpy()
            for name, shape in layout.shapes.items():
                kind = np.dtype(_TYPES[dtype] if len(shape) > 1 else np.float32)
                size = int(np.prod(shape)) * kind.itemsize
                writer.add_tensor_info(name, shape, kind, size)
            for name, values in vectors.items():
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, shape in layout.shapes.items():
                kept = dtype if len(shape) > 1 else torch.float32
                tensor = narrowed(layout.give(name, read), kept, name)
                writer.write_tensor_data(tensor.contiguous().numpy())
            for values in vectors.values():
                writer.write_tensor_data(values)
            writer.close()
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}") from None


def _family_of(config: ModelConfig, weights: Path) -> Family:
    """The family that llama.cpp computes this model as."""
    found = [
        (family, _differences(config, family)) for family in FAMILIES if family.gguf is not None
    ]
    family, lacking = min(found, key=lambda pair: len(pair[1]))
    if lacking:
        raise CheckpointError(
            f"{weights} is no model of llama.cpp's: {lack(family, lacking)} there"
        )
    return family


def _differences(config: ModelConfig, family: Family) -> list[str]:
    """Return why llama.cpp cannot compute a model: besides what its family lacks, windows, and
    activations that its architectures do not choose.
    """
    lacking = differences(config, family)
    if config.window is not None and not any(text.startswith("window=") for text in lacking):
        lacking.append(f"window={config.window}")
    if config.mlp == "geglu" and not any(text.startswith("mlp=") for text in lacking):
        lacking.append("mlp=geglu")
    if config.mlp == "gelu" and config.activation == "gelu":
        lacking.append("activation=gelu")
    return lacking


def _add_metadata(writer: Any, config: ModelConfig, family: Family) -> None:
    theirs = to_theirs(config, family)
    for key, name in family.gguf_keys.items():
        _add(writer, f"{family.gguf}.{key}", theirs[name])
    scaling = theirs.get("rope_scaling") or {}
    if "rope_theta" in theirs:
        _add(writer, f"{family.gguf}.rope.dimension_count", config.rope_size)
        _add(writer, f"{family.gguf}.attention.value_length", config.head_size)
    if scaling.get("rope_type") in ("linear", "yarn"):
        for key, name in SCALING_KEYS.items():
            if name in scaling:
                _add(writer, f"{family.gguf}.rope.scaling.{key}", scaling[name])
    if "attention_factor" in scaling:  # llama.cpp multiplies it with YaRN's own
        own = 0.1 * math.log(scaling["factor"]) + 1
        strength = scaling["attention_factor"] / own
        _add(writer, f"{family.gguf}.rope.scaling.attn_factor", strength)
    _add(writer, f"{family.gguf}.vocab_size", config.vocab_size)


def _vocabulary(weights: Path, config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the tokenizer and the chat template of the weights, without the first of which
    llama.cpp opens no file.
    """
    tokenizer = tokenizer_beside(weights, config, extra.get("tokenizer_fingerprint"))
    found = None if tokenizer is None else gguf_vocabulary(tokenizer, config.vocab_size)
    if found is not None:
        if (template := tuned_template(weights, extra, tokenizer)) is not None:
            found["tokenizer.chat_template"] = template  # goes before the tokenizer's own
        return found
    why = (
        "none lies with the weights"
        if tokenizer is None
        else f"{tokenizer.name} is of a kind, or cuts texts by a rule, that its keys do not have"
    )
    print(f"notice: the GGUF file is without a tokenizer: {why}; it is run on token ids alone")
    return {"tokenizer.ggml.model": "no_vocab"}


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, whole_characters(value))
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
