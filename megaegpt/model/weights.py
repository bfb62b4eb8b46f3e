"""A model's weights as a folder: ``model.safetensors`` with full, TP-independent tensors, and
``config.json``.

This is what a trained model is once it leaves its run: what generates, is evaluated, converted, or
becomes an encoder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.config.loading import model_config_from_dict
from megaegpt.config.validation import validate_model
from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file, sha256_of_file, whole_file
from megaegpt.json_files import conform, read_json
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import full_state, shard, spec_of
from megaegpt.parallel.partitions import fill

FORMAT, ADAPTER_FORMAT = "megaegpt-weights", "megaegpt-adapter"
VERSION = 1
WEIGHTS, ADAPTER, _CONFIG = "model.safetensors", "adapter.safetensors", "config.json"
INSTRUCTIONS = "instructions"
"""Key of ``extra``: a model that was tuned on instructions is asked in ``chats``, by the template
beside it, or in ``tasks``, by Alpaca's prompt; one that is ``mixed`` in either, each of which was
tuned in its own."""
_DESCRIPTION = "model and extra"
_LONGEST_NAME = 256
_OF_A_RUN = ("config.yaml", "metrics.jsonl")
_WITH_CHECKPOINTS = ("manifest.json", "weights/config.json", "latest", "checkpoints/latest")
_CHECKPOINTS = tuple(f"{folder}step_{'[0-9]' * 8}*" for folder in ("", "checkpoints/"))


def save_weights(
    model: nn.Module, folder: str | Path, grid: ProcessGrid, extra: dict[str, Any] | None = None
) -> None:
    """Write the full weights of a GPT, EGPT or DeepGPT; collective over the ranks of one TP group.

    Only TP rank 0 writes; call it on the ranks of dp rank 0. ``extra`` is kept in config.json.
    """
    tensors = {}
    for name, tensor in full_state(model, grid):
        if grid.tp_rank == 0:
            tensors[name] = tensor.cpu().contiguous()
    if grid.tp_rank == 0:
        config: ModelConfig = model.config  # type: ignore[assignment]
        write_weights(tensors, config, Path(folder), extra)


def write_weights(
    tensors: dict[str, Tensor], config: ModelConfig, folder: Path, extra: dict[str, Any] | None
) -> None:
    """Write whole tensors, by the names that they have in the model of ``config``."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_description(config, folder, extra)


def write_description(
    config: ModelConfig, folder: Path, extra: dict[str, Any] | None, *, adapter: bool = False
) -> None:
    """Write ``config.json`` beside the tensors of a folder, whole weights or an adapter's, with
    their checksum.
    """
    tensors = ADAPTER if adapter else WEIGHTS
    document: dict[str, Any] = {
        "format": ADAPTER_FORMAT if adapter else FORMAT,
        "version": VERSION,
        "model": dataclasses.asdict(config),
        "extra": extra or {},
    }
    document["sha256"] = {
        tensors: sha256_of_file(folder / tensors),
        _DESCRIPTION: _digest(document),
    }
    with whole_file(folder / _CONFIG) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _digest(document: dict[str, Any]) -> str:
    """Fingerprint of what the numbers mean; JSON, because lists and tuples are the same there."""
    described = [document["model"], document["extra"]]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def folder_named_by(path: Path) -> Path | None:
    """The folder that a link leads to, or that a small text file beside it names."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_symlink():
            return path.parent / os.readlink(path)
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                return path.parent / file.read(_LONGEST_NAME).strip()
    return None


def find_weights(folder: str | Path) -> Path:
    """The weights folder that ``folder`` stands for: itself, that of a checkpoint, or that of the
    latest checkpoint in a run's folder or its checkpoint directory.

    Raises:
        CheckpointError: it is none of these.
    """
    place = folder_named_by(Path(folder)) or Path(folder)
    candidates = [place, place / "weights"]
    for checkpoints in (place, place / "checkpoints"):
        if latest := folder_named_by(checkpoints / "latest"):
            candidates.append(checkpoints / latest.name / "weights")
    for candidate in candidates:
        if os.path.isfile(candidate / _CONFIG):  # false for a name that no file can have
            return candidate
    for latest in (place / "latest", place / "checkpoints" / "latest"):
        if named := folder_named_by(latest):
            raise CheckpointError(
                f"{folder} holds no weights: {latest} {_why_unnamed(latest, named)}"
            )
    raise CheckpointError(f"{folder} holds no weights: {_why_none(place)}")


def is_run_or_checkpoint(folder: Path) -> bool:
    """Whether a folder is a run's, that of its checkpoints, or one of these, whole or damaged."""
    return (
        _is_run(folder)
        or any(os.path.lexists(folder / name) for name in _WITH_CHECKPOINTS)
        or any(next(folder.glob(name), None) is not None for name in _CHECKPOINTS)
    )


def _is_run(folder: Path) -> bool:
    return all(os.path.isfile(folder / name) for name in _OF_A_RUN)


def _why_none(place: Path) -> str:
    if not os.path.exists(place):
        return "there is no such folder"
    if _is_run(place):
        return (
            "this run has no checkpoint yet: go on with it to one (checkpoint.interval), or give "
            "the folder of its checkpoint.directory, where that is another"
        )
    return f"give a folder with {_CONFIG} and {WEIGHTS}, a checkpoint, a run, or its checkpoints"


def _why_unnamed(latest: Path, named: Path) -> str:
    """What is wrong with a file or link that names no checkpoint."""
    if named == latest.parent:
        return "is empty: give a checkpoint beside it"
    name = named.name
    if not name.isprintable() or len(name) >= _LONGEST_NAME:
        return "is damaged: it does not hold the name of a checkpoint"
    return f"names {name!r}, and there is no such checkpoint; give one that is there"


def read_weights_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model configuration and the extra entries of a weights folder.

    Raises:
        CheckpointError: there is none, it is not ours, or it is damaged.
        ConfigError: it describes no model that can be built.
    """
    config, extra, is_whole = read_any_config(folder)
    if not is_whole:
        raise CheckpointError(
            f"{folder} is an adapter and no whole model: merge it first by tools/convert.py merge"
        )
    return config, extra


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds adapters of a model's weights, and not the weights."""
    return _read_description(folder).format == ADAPTER_FORMAT


def read_any_config(folder: str | Path) -> tuple[ModelConfig, dict[str, Any], bool]:
    """As :func:`read_weights_config`, of adapters too; and whether it holds whole weights.

    Raises:
        CheckpointError: there is none, it is not ours, or it is damaged.
        ConfigError: it describes no model that can be built.
    """
    document = _read_description(folder)
    path = Path(folder) / _CONFIG
    known = document.sha256.get(_DESCRIPTION)
    if known not in (None, _digest(dataclasses.asdict(document))):
        raise CheckpointError(f"{path} is damaged or was edited: its checksum differs")
    config = model_config_from_dict(document.model, str(path))
    validate_model(config, str(path))
    return config, document.extra, document.format == FORMAT


def tensors_digest(folder: str | Path) -> str:
    """sha256 of a folder's tensors, as its description has it: what adapters know their base by.

    Raises:
        CheckpointError: the description is missing or is not ours.
    """
    known = _read_description(folder).sha256.get(WEIGHTS)
    return sha256_of_file(Path(folder) / WEIGHTS) if known is None else known


def weights_checksum(folder: str | Path) -> str:
    """One text that changes with a folder's description and, by its recorded checksum, with its
    tensors, which are not read.

    Raises:
        CheckpointError: the description is missing or is not ours.
    """
    content = json.dumps(dataclasses.asdict(_read_description(folder)), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def verify_weights(folder: str | Path) -> None:
    """Read the whole of a folder's tensors and compare their checksum (one file, one process).

    Raises:
        CheckpointError: the file is missing or is not what was saved.
    """
    tensors = ADAPTER if is_adapter(folder) else WEIGHTS
    path = Path(folder) / tensors
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt"):
            pass  # whether its length is what its header says, before all of it is read
        wanted = _read_description(folder).sha256.get(tensors)
        if wanted is not None and wanted != sha256_of_file(path):
            raise CheckpointError(f"{path} is damaged: its checksum differs")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Description:
    """The contents of ``config.json`` besides ``version``."""

    model: dict[str, Any]
    extra: dict[str, Any]
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    format: str = FORMAT


def _read_description(folder: str | Path) -> _Description:
    path = Path(folder) / _CONFIG
    missing = f"{folder} is not a weights folder"
    document = read_json(path, dict[str, Any], error=CheckpointError, missing=missing)
    if document.get("format") not in (FORMAT, ADAPTER_FORMAT):
        raise CheckpointError(f"{path} is not a MegaEGPT weights description")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {document.get('version')}; this program reads {VERSION}"
        )
    return conform(document, _Description, str(path), error=CheckpointError, other_keys=True)


def load_weights(
    model: nn.Module,
    folder: str | Path,
    grid: ProcessGrid,
    *,
    allow_nonfinite: bool = False,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Fill ``model`` with this rank's slices of a folder's weights, cast to the model's types.

    Args:
        change: of a name and a whole tensor what is to be loaded instead, of the same shape.
        allow_nonfinite: take weights that are infinite or no number, with which a model computes
            nothing of use: for a run that goes on by its own policy.

    Raises:
        CheckpointError: the file is missing or damaged, names or shapes differ from the model's, or
            a weight is not finite.
    """
    path = Path(folder) / WEIGHTS
    check_tensor_file(path)
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(parameters):
                raise CheckpointError(
                    f"{path} does not fit the model: {_difference(names, parameters)}"
                )
            for name, parameter in parameters.items():
                spec, full = spec_of(parameter), file.get_tensor(name)
                if tuple(full.shape) != spec.full_shape:
                    raise CheckpointError(
                        f"{path}: {name} has shape {tuple(full.shape)}, the model {spec.full_shape}"
                    )
                if not allow_nonfinite and (count := int((~full.isfinite()).sum())):
                    raise CheckpointError(
                        f"{path}: {count:,} of the {full.numel():,} weights of {name} are infinite "
                        "or no number: the run that wrote them had diverged, take an earlier "
                        "checkpoint of it"
                    )
                full = full if change is None else change(name, full)
                fill(parameter, shard(full, spec, grid))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None


def _difference(names: set[str], parameters: dict[str, nn.Parameter]) -> str:
    missing, foreign = sorted(set(parameters) - names), sorted(names - set(parameters))
    parts = [
        f"{what} {', '.join(some[:3])}{' ...' if len(some) > 3 else ''}"
        for what, some in (("it lacks", missing), ("it has the unknown", foreign))
        if some
    ]
    return "; ".join(parts)
