"""Adapters as a folder: ``adapter.safetensors`` with whole, TP-independent factors, and the
``config.json`` that weights have, which says beside which weights they were trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.config.loading import config_to_dict
from megaegpt.config.parsing import parse_section
from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file, whole_file
from megaegpt.model.adapters import Tensors, adapter_state, merge
from megaegpt.model.base import LanguageModel
from megaegpt.model.weights import (
    ADAPTER,
    load_weights,
    read_any_config,
    tensors_digest,
    write_description,
)
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of, unshard

_LORA, _BASE = "lora", "base"


class Base(NamedTuple):
    """The weights beside which adapters are trained."""

    source: str
    """As ``training.initialize_from`` names them."""
    sha256: str
    """Of their tensors."""


class Adapter(NamedTuple):
    """What a folder of adapters says of itself."""

    folder: Path
    config: ModelConfig
    lora: LoRAConfig
    base: Base
    extra: dict[str, Any]
    """The entries that weights have too."""


def save_adapter(
    model: LanguageModel,
    folder: Path,
    grid: ProcessGrid,
    lora: LoRAConfig,
    base: Base,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a model's adapters; collective over the ranks of one TP group, of which rank 0 writes.
    Call it on the ranks of dp rank 0.
    """
    tensors = {}
    for name, parameter in adapter_state(model):
        whole = unshard(parameter, spec_of(parameter), grid)
        if grid.tp_rank == 0:
            tensors[name] = whole.cpu().contiguous()
    if grid.tp_rank == 0:
        write_adapter(tensors, folder, model.config, lora, base, extra)


def write_adapter(
    tensors: dict[str, Tensor],
    folder: Path,
    config: ModelConfig,
    lora: LoRAConfig,
    base: Base,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write whole factors, by the names that they have in the model of ``config``."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / ADAPTER) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    described = {**(extra or {}), _LORA: config_to_dict(lora), _BASE: base._asdict()}
    write_description(config, folder, described, adapter=True)


def read_adapter(folder: str | Path) -> Adapter:
    """Read the description of a folder of adapters.

    Raises:
        CheckpointError: it is damaged, or holds whole weights.
    """
    config, extra, is_whole = read_any_config(folder)
    if is_whole:
        raise CheckpointError(f"{folder} holds whole weights and no adapter: there is no base")
    lora = lora_of(extra)
    try:
        base = Base(**extra[_BASE])
    except (KeyError, TypeError):
        base = None
    if lora is None or base is None:
        raise CheckpointError(f"{folder} is damaged: it does not say what its adapter is")
    rest = {name: value for name, value in extra.items() if name not in (_LORA, _BASE)}
    return Adapter(Path(folder), config, lora, base, rest)


def lora_of(extra: Mapping[str, Any]) -> LoRAConfig | None:
    """The adapters that the ``extra`` of a description names; None: it is of whole weights."""
    values = extra.get(_LORA)
    return parse_section(LoRAConfig, values, _LORA, []) if isinstance(values, dict) else None


def check_base(adapter: Adapter, weights: Path) -> None:
    """Refuse other weights than those beside which an adapter was trained.

    Raises:
        CheckpointError: they are others.
    """
    if tensors_digest(weights) != adapter.base.sha256:
        raise CheckpointError(
            f"{adapter.folder} was trained beside other weights than {weights} (sha256 "
            f"{adapter.base.sha256[:12]}, now {tensors_digest(weights)[:12]}): give those of "
            f"{adapter.base.source} as they were"
        )


@contextlib.contextmanager
def open_adapter(adapter: Adapter) -> Iterator[Tensors]:
    """The opened factors of a folder.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = adapter.folder / ADAPTER
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None


def load_merged(model: LanguageModel, adapter: Adapter, weights: Path, grid: ProcessGrid) -> None:
    """Fill a model without adapters with weights to which an adapter's products are added.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit, or the base is another one.
    """
    check_base(adapter, weights)
    scale = adapter.lora.scale
    with open_adapter(adapter) as tensors:
        load_weights(
            model, weights, grid, change=lambda name, full: merge(full, name, tensors, scale)
        )
