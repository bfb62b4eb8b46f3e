"""GPT-2 weights in Hugging Face's form: folders read, models downloaded, conversions kept.

Their library is not needed for it; nothing is unpickled except tensors (``weights_only``).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.config.validation import validate_model
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.files import whole_folder
from megaegpt.interop.gpt2_layout import from_theirs
from megaegpt.model.build import empty_model, meta_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid

CONFIG = "config.json"
_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_HUB_PREFIX = "hf:"
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_BUILT_IN = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""What of their configuration decides the arithmetic, and is not a choice in ours."""


# -- reading --------------------------------------------------------------------------------------


def is_huggingface_folder(folder: Path) -> bool:
    """Whether the folder describes a model in Hugging Face's form (of whatever architecture)."""
    try:
        return "model_type" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_config(folder: Path) -> ModelConfig:
    """Our configuration of the GPT-2 that ``folder`` holds.

    Raises:
        CheckpointError: it is damaged, or describes a model that computes something else.
    """
    path = folder / CONFIG
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        for key, value in _BUILT_IN.items():
            if theirs.get(key, value) != value:
                raise CheckpointError(f"{path}: {key}={theirs[key]} is not supported, only {value}")
        activation = theirs.get("activation_function", "gelu_new")
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise CheckpointError(f"{path}: activation_function={activation} is none of {known}")
        config = ModelConfig(
            vocab_size=theirs["vocab_size"],
            max_seq_len=theirs["n_positions"],
            hidden_size=theirs["n_embd"],
            num_layers=theirs["n_layer"],
            num_heads=theirs["n_head"],
            ffn_hidden_size=theirs.get("n_inner"),
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
            tied_embeddings=theirs.get("tie_word_embeddings", True),
            layer_norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
            init_std=theirs.get("initializer_range", 0.02),
        )
        validate_model(config, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used: {type(error).__name__} {error}") from None
    return config


def import_gpt2(folder: str | Path, output: str | Path) -> None:
    """Turn a Hugging Face GPT-2 folder into one of our weights folders, in fp32.

    Raises:
        CheckpointError: ``folder`` lacks a file or a tensor, or a tensor has another shape than its
            configuration says.
    """
    folder = Path(folder)
    config = read_config(folder)
    theirs = {name.removeprefix("transformer."): t for name, t in _read_tensors(folder).items()}
    try:
        ours = from_theirs(theirs, config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    for name, parameter in meta_model(config).named_parameters():
        if ours[name].shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(ours[name].shape)} in the file, "
                f"{tuple(parameter.shape)} by {CONFIG}"
            )
    grid = ProcessGrid()
    model = empty_model(config, grid)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours[name])
    save_weights(model, output, grid, {"imported_from": str(folder)})


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: safetensors if there are any, in one file or several."""
    for single in (_SAFETENSORS, _PICKLED):
        files = (
            [folder / single] if (folder / single).is_file() else _files_of_index(folder, single)
        )
        if files:
            break
    else:
        raise CheckpointError(f"{folder} has neither {_SAFETENSORS} nor {_PICKLED}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            if single == _SAFETENSORS:
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        except Exception as error:  # torch.load and safetensors raise a dozen kinds for damage
            reason = str(error).split("\n", 1)[0]
            raise CheckpointError(f"{file} is damaged or unsafe: {reason}") from None
    return tensors


def _files_of_index(folder: Path, single: str) -> list[Path]:
    index = folder / f"{single}.index.json"
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from None
    return [folder / Path(name).name for name in sorted(names)]


# -- downloading, and keeping what was converted --------------------------------------------------


def is_hub_name(source: str) -> bool:
    """``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, or ``hf:owner/name``."""
    return source in HUB_NAMES or source.startswith(_HUB_PREFIX)


def download(source: str, only_here: bool = False) -> Path:
    """The folder of a model from the hub, or from the hub's own cache.

    Args:
        only_here: look in the cache alone.

    Raises:
        CheckpointError: it is not there, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name = source.removeprefix(_HUB_PREFIX)
    patterns = {_SAFETENSORS: ["model*.safetensors*"], _PICKLED: ["pytorch_model*.bin*"]}
    try:
        for wanted in patterns.values():
            folder = Path(
                snapshot_download(
                    name, allow_patterns=[CONFIG, *wanted], local_files_only=only_here
                )
            )
            if any(path for pattern in wanted for path in folder.glob(pattern)):
                break
    except Exception as error:  # whatever a download can raise
        raise CheckpointError(
            f"{name} cannot be had from the Hugging Face hub ({type(error).__name__}): download it "
            "where there is a network, and give its folder"
        ) from None
    return folder


def converted(folder: Path) -> Path:
    """Our form of a Hugging Face folder, made once for each state of its files.

    Kept under ``$MEGAEGPT_CACHE``, else ``$XDG_CACHE_HOME/megaegpt``, else ``~/.cache/megaegpt``.
    """
    cache = Path(
        os.environ.get("MEGAEGPT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaegpt"
    )
    target = cache / "converted" / f"{folder.resolve().name}-{_state_of(folder)}"
    if target.is_dir():
        return target
    try:
        with whole_folder(target) as temporary:
            import_gpt2(folder, temporary)
    except CheckpointError:
        if not target.is_dir():  # else another process was quicker, with the same result
            raise
    return target


def _state_of(folder: Path) -> str:
    """Changes with the place, size or time of any file that matters."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".bin", ".safetensors")
    ]
    state = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
