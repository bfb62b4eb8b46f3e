"""Optimizer state between topologies, through DeepSpeed's universal checkpoint.

Used by :mod:`megaegpt.training.engine.engine` only. A universal checkpoint holds, for every
parameter, its full fp32 value and moments in files of their own; any number of ranks cuts its
slices from them. DeepSpeed's converter makes one from a checkpoint of ZeRO stage 1 or 2, and its
engine reads one into these. Stage 0, which both of them lack, and stage 3, which they have for
their own tensor parallelism only, are done here in the same format.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CAT_DIM,
    DS_VERSION,
    FP32_FLAT_GROUPS,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    TP_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
)
from torch import Tensor, nn

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import ParamSpec, shard, spec_of

_VERSION = 0.2
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW; Muon has the first alone."""
FP32 = "fp32"
_GLOBAL_STATE = (LOSS_SCALER, "dynamic_loss_scale", "overflow")

Specs = dict[str, ParamSpec]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
"""Shapes of whole parameters, by name in the order of the model."""


def universal_info(specs: Specs) -> dict[str, Any]:
    """How the converter puts the slices of each parameter together; kept in every checkpoint.

    Padded vocabulary rows are the same at every tensor-parallel size, so vocabulary matrices are
    cut and joined like any other; no parameter needs DeepSpeed's re-padding.
    """
    replicated = [name for name, spec in specs.items() if spec.tp_dim is None]
    by_row = [name for name, spec in specs.items() if spec.tp_dim == 1]
    return {
        UNIVERSAL_CHECKPOINT_VERSION_KEY: _VERSION,
        TP_REPLICATED_PARAMETER_PATTERNS: [_exactly(name) for name in replicated],
        PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: [_exactly(name) for name in by_row],
    }


def _exactly(name: str) -> str:
    return re.escape(name) + "$"


def convert(source: Path, target: Path, shapes: Shapes, zero_stage: int) -> None:
    """Write the universal form of a DeepSpeed checkpoint folder; by one process.

    How the parameters were cut is read from the checkpoint: it may differ from how the ranks that
    load it cut them, which share key and value heads or do not.

    Args:
        source: folder with ``mp_rank_*`` files, saved at ``zero_stage``.
        target: folder to make.
        shapes: of every trainable parameter, whole.
    """
    if zero_stage == 0:
        _convert_replicated(source, target, shapes)
        return
    if zero_stage == 3:
        _convert_partitioned(source, target)
        return
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: its children would inherit CUDA and gloo
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with _filling_in_second_moments() as filled:
        ds_to_universal.main(options)
    for name in filled:
        (target / "zero" / name / "exp_avg_sq.pt").unlink()


@contextlib.contextmanager
def _filling_in_second_moments() -> Iterator[set[str]]:
    """Let the converter find two moments of every parameter, as it must: of one that has only the
    first, which is Muon's, that one twice. The set has the names of those when it is through.
    """
    filled: set[str] = set()
    read = ds_to_universal.DeepSpeedCheckpoint.get_zero_checkpoint_state

    def read_and_fill(*args: Any, **arguments: Any) -> Any:
        # Padding stays: parameters are cut out by their places in any case, and bf16 at stage 1
        # notes more of it than a partition has in a group that leaves ranks without a share.
        loaded = read(*args, **arguments, strip_tensor_paddings=False)
        optimizer = loaded[OPTIMIZER_STATE_DICT]
        for number, state in optimizer[BASE_OPTIMIZER_STATE]["state"].items():
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = state["exp_avg"]
                filled.update(optimizer[PARAM_SLICE_MAPPINGS][number])
        return loaded

    ds_to_universal.DeepSpeedCheckpoint.get_zero_checkpoint_state = read_and_fill
    try:
        yield filled
    finally:
        ds_to_universal.DeepSpeedCheckpoint.get_zero_checkpoint_state = read


def set_group_count(universal: Path, count: int) -> None:
    """Let a universal checkpoint have as many parameter groups as the optimizer that is to read it:
    DeepSpeed would pass over those that are more, and leave their parameters as they are.

    What the groups say there is not used: a run's own settings count.
    """
    path = universal / "zero" / "optimizer_state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.save({**state, PARAM_GROUPS: [{} for _ in range(count)]}, path)


def _convert_replicated(source: Path, target: Path, shapes: Shapes) -> None:
    files = sorted(source.glob("mp_rank_*_model_states.pt"))
    ranks = [torch.load(f, map_location="cpu", weights_only=True, mmap=True) for f in files]
    states = [rank["optimizer"]["state"] for rank in ranks]
    info = ranks[0][UNIVERSAL_CHECKPOINT_INFO]
    groups = ranks[0]["optimizer"]["param_groups"]
    for number, name in enumerate(_order_of(groups) or optimizer_order(shapes)):
        tp_dim, folder = _saved_tp_dim(info, name), target / "zero" / name
        folder.mkdir(parents=True)
        _save_joined([rank["module"][name] for rank in ranks], tp_dim, folder / f"{FP32}.pt")
        for moment in MOMENTS:
            if moment in states[0][number]:
                slices = [state[number][moment] for state in states]
                _save_joined(slices, tp_dim, folder / f"{moment}.pt")
        torch.save(states[0][number]["step"], folder / "step.pt")
    common = {
        PARAM_GROUPS: groups,
        DS_VERSION: deepspeed.__version__,
    }
    torch.save(common, target / "zero" / "optimizer_state.pt")
    for file in files:
        shutil.copy2(file, target)


def _convert_partitioned(source: Path, target: Path) -> None:
    """Of ZeRO stage 3, where each data-parallel rank has an equal part of every parameter, with
    padding behind the last number.
    """
    models = _by_ranks(source, "model_states")
    optimizers = {
        ranks: state[OPTIMIZER_STATE_DICT]
        for ranks, state in _by_ranks(source, "optim_states").items()
    }
    tp_size, dp_size = (1 + max(ranks) for ranks in zip(*models, strict=True))
    info, first = models[0, 0][UNIVERSAL_CHECKPOINT_INFO], optimizers[0, 0]
    for number, slices in enumerate(models[0, 0][PARAM_SHAPES]):
        start = 0
        for name, shape in slices.items():
            size = -(-shape.numel() // dp_size)
            tp_dim, folder = _saved_tp_dim(info, name), target / "zero" / name
            folder.mkdir(parents=True)
            for what in (FP32, *MOMENTS):
                parts = [
                    [
                        _flat_states(optimizers[tp, dp], number)[what].narrow(0, start, size)
                        for dp in range(dp_size)
                    ]
                    for tp in range(tp_size)
                ]
                joined = [torch.cat(of_rank)[: shape.numel()].view(shape) for of_rank in parts]
                _save_joined(joined, tp_dim, folder / f"{what}.pt")
            step = first[OPTIMIZER_STATE_DICT]["state"][number]["step"]
            torch.save(step, folder / "step.pt")
            start += size
    common = {
        PARAM_GROUPS: first[OPTIMIZER_STATE_DICT][PARAM_GROUPS],
        DS_VERSION: deepspeed.__version__,
        **{key: first[key] for key in _GLOBAL_STATE},
    }
    torch.save(common, target / "zero" / "optimizer_state.pt")
    for tp in range(tp_size):
        torch.save(models[tp, 0], target / f"mp_rank_{tp:02d}_model_states.pt")


def _by_ranks(source: Path, kind: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The files of ZeRO stage 3 by tensor-parallel and data-parallel rank."""
    found = {}
    for path in source.glob(f"*zero_pp_rank_*_mp_rank_*_{kind}.pt"):
        dp_rank, tp_rank = re.findall(r"rank_(\d+)", path.name)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found[int(tp_rank), int(dp_rank)] = state
    return found


def _flat_states(optimizer: dict[str, Any], number: int) -> dict[str, Tensor]:
    """A rank's parts of all parameters of a group: their fp32 values and moments."""
    state = optimizer[OPTIMIZER_STATE_DICT]["state"][number]
    moments = {moment: state[moment] for moment in MOMENTS}
    return {FP32: optimizer[FP32_FLAT_GROUPS][number], **moments}


def _saved_tp_dim(info: dict[str, Any], name: str) -> int | None:
    """The dimension that a parameter was cut in when :func:`universal_info` was taken of it."""
    if _exactly(name) in info[TP_REPLICATED_PARAMETER_PATTERNS]:
        return None
    return 1 if _exactly(name) in info[PARAMETER_WITH_ROW_PARALLELISM_PATTERNS] else 0


def _save_joined(slices: list[Tensor], tp_dim: int | None, path: Path) -> None:
    if tp_dim is None:
        torch.save({PARAM: slices[0].clone()}, path)
    else:
        torch.save({PARAM: torch.cat(slices, dim=tp_dim), CAT_DIM: tp_dim}, path)


def read_parameter(folder: Path, name: str, what: str, shape: Shape) -> Tensor:
    """One whole tensor of a universal checkpoint: ``fp32``, ``exp_avg`` or ``exp_avg_sq``."""
    return _read(folder, name, what)[PARAM].view(shape)


def _read(folder: Path, name: str, what: str) -> Any:
    path = folder / "zero" / name / f"{what}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def _order_of(groups: list[dict[str, Any]]) -> list[str]:
    """The names that groups have, where they have any."""
    return [name for group in groups for name in group.get("names", [])]


def optimizer_order(shapes: Shapes) -> Iterable[str]:
    """Names in the order of AdamW's groups: matrices, then vectors."""
    return sorted(shapes, key=lambda name: len(shapes[name]) < 2)  # stable


@torch.no_grad()
def load_partitioned(
    optimizer: Any, names: dict[nn.Parameter, str], folder: Path, grid: ProcessGrid
) -> None:
    """Fill this rank's parts of ZeRO stage 3 from a universal checkpoint.

    Args:
        optimizer: DeepSpeed's, whose parameters no module has whole.
        names: of its parameters.
    """
    path = folder / "zero" / "optimizer_state.pt"
    optimizer._load_global_state_stage3(torch.load(path, map_location="cpu", weights_only=True))
    for number, parameters in enumerate(optimizer.fp16_groups):
        masters = optimizer.fp32_partitioned_groups_flat[number]
        moments = {moment: torch.zeros_like(masters) for moment in MOMENTS}
        start = 0
        for parameter in parameters:
            name, spec, size = names[parameter], spec_of(parameter), parameter.partition_numel()
            for what, flat in ((FP32, masters), *moments.items()):
                whole = read_parameter(folder, name, what, spec.full_shape)
                part = shard(whole, spec, grid).reshape(-1)[grid.replica_rank * size :][:size]
                flat[start : start + len(part)].copy_(part)
            start += size
        step = _read(folder, names[parameters[0]], "step").to(masters.device)
        optimizer.optimizer.state[masters] = {"step": step, **moments}
        optimizer.fp16_partitioned_groups_flat[number].copy_(masters)


def load_replicated(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, grid: ProcessGrid
) -> None:
    """Fill a stage 0 model and its optimizer with this rank's slices of a universal checkpoint."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trainable:
        spec = spec_of(parameter)

        def read(what: str, name: str = name, spec: ParamSpec = spec) -> Tensor:
            return shard(read_parameter(folder, name, what, spec.full_shape), spec, grid)

        with torch.no_grad():
            parameter.copy_(read(FP32))
        state = {
            moment: read(moment).to(parameter.device).clone(memory_format=torch.contiguous_format)
            for moment in MOMENTS
            if (folder / "zero" / name / f"{moment}.pt").exists()
        }
        step = _read(folder, name, "step").to(parameter.device)
        optimizer.state[parameter] = {"step": step, **state}
