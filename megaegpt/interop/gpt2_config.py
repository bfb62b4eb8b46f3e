"""Hugging Face's description of a GPT-2, and what it is in ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaegpt.config import ModelConfig
from megaegpt.config.validation import validate_model
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.interop.tensor_files import weight_files
from megaegpt.json_files import conform, read_json

CONFIG = "config.json"
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_BUILT_IN: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
}
"""What of their configuration decides the arithmetic, and is not a choice in ours; each value that
we compute, the first being their default."""


@dataclass(frozen=True)
class _Theirs:
    """What their configuration chooses of what is a choice in ours; the defaults are theirs too."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02


_OTHER_NAMES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
"""Under which transformers reads the same values."""


def is_huggingface_folder(folder: Path) -> bool:
    """Whether the folder describes a model in Hugging Face's form (of whatever architecture)."""
    try:
        return "model_type" in read_description(folder)
    except CheckpointError:
        return False


def read_description(folder: Path) -> dict[str, Any]:
    """The values of a folder's ``config.json``, of whatever architecture.

    Raises:
        CheckpointError: the file is missing, cannot be read, or holds no JSON object.
    """
    return read_json(folder / CONFIG, dict[str, Any], error=CheckpointError)


def read_config(folder: Path) -> ModelConfig:
    """Our configuration of the GPT-2 that ``folder`` holds.

    Raises:
        CheckpointError: it is damaged, describes a model that computes something else, or one that
            is larger than the folder's files.
    """
    config = convert_config(read_description(folder), str(folder / CONFIG))
    check_size(config, folder)
    return config


def check_size(config: ModelConfig, folder: Path) -> None:
    """Refuse a model larger than the folder's files before anything is made of its size.

    Raises:
        CheckpointError: it is, or a file is missing.
    """
    held = sum(file.stat().st_size for file in weight_files(folder))
    if (parameters := _least_parameters(config)) > held:
        raise CheckpointError(
            f"{folder / CONFIG} describes a model of {parameters:,} parameters or more, its files "
            f"hold {held:,} bytes"
        )


def convert_config(theirs: dict[str, Any], source: str) -> ModelConfig:
    """Our configuration of the GPT-2 that a ``config.json`` of theirs describes.

    Raises:
        CheckpointError: it computes something else, or has values of other types; the message
            begins with ``source``.
    """
    if "model_type" not in theirs:
        raise CheckpointError(f"{source} describes no model in Hugging Face's form: no model_type")
    for key, allowed in _BUILT_IN.items():
        if (value := theirs.get(key, allowed[0])) not in allowed:
            raise CheckpointError(
                f"{source}: {key}={_shown(value)} is not supported, only {allowed[0]}"
            )
    values = conform(
        _by_their_first_names(theirs, source),
        _Theirs,
        source,
        error=CheckpointError,
        other_keys=True,
    )
    activation = values.activation_function
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise CheckpointError(
            f"{source}: activation_function={_shown(activation)} is none of {known}"
        )
    config = ModelConfig(
        vocab_size=values.vocab_size,
        max_seq_len=values.n_positions,
        hidden_size=values.n_embd,
        num_layers=values.n_layer,
        num_heads=values.n_head,
        ffn_hidden_size=values.n_inner,
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
        tied_embeddings=values.tie_word_embeddings,
        layer_norm_eps=values.layer_norm_epsilon,
        init_std=values.initializer_range,
    )
    try:
        validate_model(config, source)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return config


def _by_their_first_names(theirs: dict[str, Any], source: str) -> dict[str, Any]:
    """The same values, none of them under the second of two names."""
    values = dict(theirs)
    for name, other in _OTHER_NAMES.items():
        if other not in theirs:
            continue
        value = values.setdefault(name, theirs[other])
        if value != theirs[other]:
            raise CheckpointError(
                f"{source}: {name}={_shown(value)}, but {other}={_shown(theirs[other])}"
            )
    return values


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _least_parameters(config: ModelConfig) -> int:
    """Elements of the matrices, counted without building a model, which may be of any size."""
    width, inner = config.hidden_size, config.ffn_size
    layers = config.num_layers * (4 * width * width + 2 * width * inner)
    return layers + (config.vocab_size + config.max_seq_len) * width
