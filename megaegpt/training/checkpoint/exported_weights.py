"""The part of a checkpoint that leaves a run: whole weights, or adapters, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megaegpt.config import RunConfig
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.model.adapter_files import Base, write_adapter
from megaegpt.model.adapters import adapter_state
from megaegpt.model.build import Model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import write_weights
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of, unshard
from megaegpt.parallel.partitions import gathered, is_partitioned
from megaegpt.training.checkpoint.host_copies import HostCopies
from megaegpt.training.run_data import RunData


def exported_weights(
    config: RunConfig,
    model: Model,
    grid: ProcessGrid,
    data: RunData,
    encoder: FrozenEncoder | None,
    base: Base | None,
    copies: HostCopies | None,
) -> Callable[[Path], None]:
    """Gather the model for generation, evaluation, conversion, or use as an encoder; or its
    adapters, for the first three. Collective over the ranks of a TP group; over all ranks at ZeRO
    stage 3.

    Args:
        base: of adapters.
        copies: made of what training will change before the files are written; None: nothing is
            changed before.

    Returns:
        What writes the files into a folder; on all ranks but the main one, nothing.
    """
    state = list(model.named_parameters() if base is None else adapter_state(model))
    tensors = _whole_tensors(state, grid, copies)
    if grid.rank != 0:
        return _nothing
    extra: dict[str, Any] = {"tokenizer_fingerprint": data.tokenizer.fingerprint}
    if encoder is not None:
        extra |= encoder.description()

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        described = extra | data.save_beside(folder)
        if base is None:
            write_weights(tensors, model.config, folder, described)
        else:
            write_adapter(tensors, folder, model.config, config.training.lora, base, described)
        if not data.tokenizer.is_installed:
            save_tokenizer(data.tokenizer, folder)

    return write


def _whole_tensors(
    state: list[tuple[str, nn.Parameter]], grid: ProcessGrid, copies: HostCopies | None
) -> dict[str, Tensor]:
    """Whole tensors in host memory, on rank 0; other ranks give their slices, where they are the
    only ones, and have none.
    """
    tensors = {}
    for name, parameter in state:
        with gathered([parameter]):
            if grid.replica_rank != 0:
                continue
            whole = unshard(parameter, spec_of(parameter), grid)
            if grid.tp_rank != 0:
                continue
            if is_partitioned(parameter):  # what was gathered goes again, and is nobody else's
                tensors[name] = whole.detach().to("cpu", copy=True).contiguous()
                continue
            if copies is not None and whole.data_ptr() == parameter.data_ptr():
                whole = copies.of(whole)
            tensors[name] = whole.detach().cpu().contiguous()
    return tensors


def _nothing(folder: Path) -> None:
    """What a rank does that has no files to write."""
