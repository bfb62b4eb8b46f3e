"""A checkpoint written again for another topology: merged, split, or cut over other ranks."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any, Literal

from megaegpt.config import (
    LoRAConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megaegpt.config.parsing import parse_section
from megaegpt.config.validation import validate
from megaegpt.errors import CheckpointError
from megaegpt.model.adapter_files import lora_of, read_adapter
from megaegpt.model.adapters import add_adapters
from megaegpt.model.build import empty_model
from megaegpt.model.weights import read_any_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import raising_together
from megaegpt.training.checkpoint.manager import STATE, CheckpointManager, Part
from megaegpt.training.checkpoint.manifest import Manifest
from megaegpt.training.engine.engine import Engine

ZeroStage = Literal[0, 1, 2, 3]


def reshape(
    checkpoint: Path, output: Path, grid: ProcessGrid, zero_stage: ZeroStage | None = None
) -> Path:
    """Write ``checkpoint`` into the directory ``output`` as the ranks of ``grid`` would have saved
    it: weights, optimizer state and the loop's state. Collective over all ranks.

    A run needs no such step, it resumes at any topology by itself; but here it takes place once,
    before many starts or on a machine that has the room.

    Args:
        checkpoint: one checkpoint's folder.
        output: a directory without checkpoints; a run's ``checkpoint.directory`` from then on.
        zero_stage: of the new one; None: as it is.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or ``output`` is in use or cannot be written.
        ConfigError: the model cannot be divided over these ranks.
    """
    with raising_together(grid):
        config = _config(checkpoint, grid, zero_stage)
        manager = CheckpointManager(output, keep=1)
        if manager.latest() is not None:
            raise CheckpointError(f"{output} holds checkpoints already: name another directory")
        if grid.is_main:
            _make(output)
    manifest = Manifest.read(checkpoint)
    model = empty_model(config.model, grid)
    if config.training.lora.rank is not None:
        add_adapters(model, config.training.lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in manifest.parameters)  # the others were frozen
    engine = Engine(model, grid, config)
    state = manager.load(engine, checkpoint)
    folders = [path for path in checkpoint.iterdir() if path.is_dir() and path.name != STATE]

    def copy(source: Path, folder: Path) -> None:
        if grid.is_main:
            shutil.copytree(source, folder)

    def part_of(source: Path) -> Part:
        return lambda _: functools.partial(copy, source)

    parts = {folder.name: part_of(folder) for folder in folders}
    saved = manager.save(engine, manifest.step, state, parts)
    engine.close()
    return saved


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from None


def _layout_of_stage_3(manifest: Manifest) -> dict[str, Any]:
    """The key of the section ``deepspeed`` by which a run's optimizer states lie in groups."""
    raw = (manifest.trainer.get("config") or {}).get("deepspeed") or {}
    size = (raw.get("zero_optimization") or {}).get("sub_group_size")
    return {} if size is None else {"zero_optimization": {"sub_group_size": size}}


def _config(checkpoint: Path, grid: ProcessGrid, zero_stage: ZeroStage | None) -> RunConfig:
    """The part of the run's configuration that its state depends on."""
    manifest = Manifest.read(checkpoint)
    model, extra, _ = read_any_config(checkpoint / "weights")
    lora = lora_of(extra)
    saved = manifest.topology
    saved_optimizer = (manifest.trainer.get("config") or {}).get("optimizer", {})
    stage = saved["zero_stage"] if zero_stage is None else zero_stage
    layout = {key: saved_optimizer[key] for key in ("kind", "groups") if key in saved_optimizer}
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(
            tensor_parallel_size=grid.tp_size,
            context_parallel_size=grid.cp_size,
            zero_stage=stage,
        ),
        training=TrainingConfig(
            # Of no effect on the state, and the run's need not go over these ranks: those that
            # share samples in it are data-parallel here.
            global_batch_size=grid.dp_size,
            micro_batch_size=1,
            precision=saved["precision"],
            lora=LoRAConfig() if lora is None else lora,
            # Adapters are written without the weights beside which they were trained.
            initialize_from=None if lora is None else read_adapter(checkpoint / "weights").base[0],
        ),
        optimizer=parse_section(OptimizerConfig, layout, "optimizer.", []),
        deepspeed=_layout_of_stage_3(manifest) if stage == 3 else {},
    )
    validate(config, grid.world_size)
    return config
