"""GPT-2 weights in Hugging Face's form: folders read, models downloaded, conversions kept.

Their library is not needed for it; nothing is unpickled except tensors (``weights_only``).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from megaegpt.errors import CheckpointError
from megaegpt.files import whole_folder
from megaegpt.interop.gpt2_config import CONFIG, check_size, convert_config, read_description
from megaegpt.interop.gpt2_layout import from_theirs
from megaegpt.interop.tensor_files import PICKLED, SAFETENSORS, check_finite, read_tensors
from megaegpt.model.build import empty_model
from megaegpt.model.weights import save_weights
from megaegpt.parallel.grid import ProcessGrid

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_HUB_PREFIX = "hf:"
_CONVERSION = 2
"""Raise it with every change of what a folder becomes: older conversions are then made anew."""


# -- reading --------------------------------------------------------------------------------------


def import_gpt2(folder: str | Path, output: str | Path) -> None:
    """Turn a Hugging Face GPT-2 folder into one of our weights folders, in fp32.

    Raises:
        CheckpointError: ``folder`` lacks a file or a tensor, holds one that this would not use, or
            one that is not finite or has another shape than its configuration says.
    """
    folder = Path(folder)
    config = convert_config(read_description(folder), str(folder / CONFIG))
    theirs = read_tensors(folder)
    check_size(config, folder)
    try:
        ours = from_theirs(theirs, config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    grid = ProcessGrid()
    model = empty_model(config, grid)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours[name])
    check_finite(dict(model.named_parameters()), folder)
    save_weights(model, output, grid, {"imported_from": str(folder)})


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
    patterns = {SAFETENSORS: ["model*.safetensors*"], PICKLED: ["pytorch_model*.bin*"]}
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
    """Changes with the place, size or time of any file that matters, and with the conversion."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".bin", ".safetensors")
    ]
    state = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps([_CONVERSION, state]).encode()).hexdigest()[:16]
