"""The tensors of a folder in Hugging Face's form: safetensors or torch's files, one or several.

Nothing is unpickled except tensors (``weights_only``), and no tensor is larger than its file.
"""

from __future__ import annotations

import functools
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file, is_lfs_pointer
from megaegpt.json_files import read_json

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class _Index:
    """Of several files, which one holds each tensor."""

    weight_map: dict[str, str]


_SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, read when it is needed."""

    shape: tuple[int, ...]
    dtype: str
    """As torch prints it, or the file's own name of a type that no weights have."""
    read: Callable[[], Tensor]
    """Its values, on the CPU, in the precision of the file or in fp32."""


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors: safetensors if there are any, else torch's.

    Raises:
        CheckpointError: there are none, one is missing or stands for another, or the index of
            several is damaged.
    """
    index = _index_of(folder)
    if index is not None:
        files = [folder / name for name in sorted(set(_read_index(index).values()))]
    else:
        files = [folder / name for name in (SAFETENSORS, PICKLED) if (folder / name).exists()][:1]
    for file in files:
        _check_is_whole(file)
    if not files:
        raise CheckpointError(f"{folder} has neither {SAFETENSORS} nor {PICKLED}")
    return files


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, none of them read yet.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe, holds something other than tensors,
            or is not what its index says.
    """
    tensors: dict[str, StoredTensor] = {}
    holders: dict[str, Path] = {}
    for file in weight_files(folder):
        for name, tensor in _open_file(file).items():
            if name in holders:
                raise CheckpointError(f"{name} is both in {holders[name]} and in {file}")
            tensors[name], holders[name] = tensor, file
    index = _index_of(folder)
    for name, holder in ({} if index is None else _read_index(index)).items():
        if name not in holders or holders[name].name != holder:
            raise CheckpointError(f"{folder / holder} lacks {name}, which {index} says it holds")
    return tensors


def check_finite(name: str, tensor: Tensor, source: Path) -> None:
    """Refuse weights with which every computation would give nothing but NaN.

    Raises:
        CheckpointError: a value of the tensor is NaN or infinite.
    """
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{source}: {count:,} of {tensor.numel():,} values of {name} are NaN or infinite"
        )


# -- the index of several files -------------------------------------------------------------------


def _index_of(folder: Path) -> Path | None:
    """The index that says which files there are; None if there is a single file, or nothing."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).exists():
            return None
        if (index := folder / f"{name}.index.json").exists():
            return index
    return None


def _read_index(path: Path) -> dict[str, str]:
    """File names by the names of the tensors that they hold."""
    places = read_json(path, _Index, error=CheckpointError, other_keys=True).weight_map
    if not places:
        raise CheckpointError(f"{path} is damaged: its weight_map is empty")
    for tensor, file in places.items():
        if Path(file).name != file or file in ("", ".."):
            raise CheckpointError(
                f"{path}: {tensor[:80]} is said to be in {file[:80]!r}, which is no file of this "
                "folder"
            )
    return places


# -- one file -------------------------------------------------------------------------------------


def _check_is_whole(file: Path) -> None:
    if not file.exists():
        raise CheckpointError(f"{file} is missing")
    if not file.is_file():
        raise CheckpointError(f"{file} is no regular file")
    try:
        is_pointer = is_lfs_pointer(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    if is_pointer:
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder, or "
            "download the file"
        )


def _open_file(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        check_tensor_file(file)
    try:
        return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickled(file)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load and safetensors raise a dozen kinds for damage
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise CheckpointError(f"{file} is damaged or unsafe: {reason}") from None


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    opened = safe_open(file, framework="pt")
    tensors = {}
    for name in opened.keys():  # noqa: SIM118, no mapping
        part = opened.get_slice(name)
        dtype = _SAFETENSORS_TYPES.get(part.get_dtype(), part.get_dtype())
        read = functools.partial(opened.get_tensor, name)
        tensors[name] = StoredTensor(tuple(part.get_shape()), str(dtype), read)
    return tensors


def _open_pickled(file: Path) -> dict[str, StoredTensor]:
    tensors = {}
    for name, tensor in _read_pickled(file).items():
        if (problem := _problem_of(tensor)) is not None:
            raise CheckpointError(f"{file}: {str(name)[:200]} {problem}")
        read = functools.partial(Tensor.detach, tensor)
        tensors[name] = StoredTensor(tuple(tensor.shape), str(tensor.dtype), read)
    return tensors


def _read_pickled(file: Path) -> dict[str, Any]:
    """Read a file of ``torch.save``: a zip archive since torch 1.6, a bare pickle before."""
    is_archive = zipfile.is_zipfile(file)
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(
                    f"{file} is compressed, which torch.save never does: it may unfold to any size"
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old formats, which are read all the same
        content = torch.load(file, map_location="cpu", mmap=is_archive, weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} holds no tensors by name, but a {type(content).__name__}")
    return content


def _problem_of(value: object) -> str | None:
    """Return why a value of a file cannot be used as weights; None if it can."""
    if not isinstance(value, Tensor):
        return f"is no tensor, but a {type(value).__name__}"
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return "is no plain tensor (sparse, quantized or without content)"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"claims shape {tuple(value.shape)}, more than the file holds"
    return None
