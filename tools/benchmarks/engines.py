"""Our models under the training engine, as a real run has them. Imports DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megaegpt.config import (
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megaegpt.model.adapters import choose_trained, initialize_adapters
from megaegpt.model.build import build_model, meta_model
from megaegpt.parallel.devices import local_device
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.launch import init_distributed
from megaegpt.planning.hardware import peak_flops
from megaegpt.training.engine import engine as training_engine
from megaegpt.training.engine.engine import Engine, LossFunction, call_model
from megaegpt.training.logging.metrics import device_name

PLAIN = {"zero": 0, "precision": "auto", "recompute": "none", "compile": False}
"""The least that a step can be."""


def build_engine(
    model_config: ModelConfig,
    batch: int,
    options: dict[str, Any],
    loss_function: LossFunction = call_model,
) -> Engine:
    """An engine over all processes of this candidate, each with its share of ``batch`` samples.

    Args:
        model_config: of the trainable model.
        batch: samples a step over all processes, in one micro-step.
        options: as :data:`PLAIN`; and, to measure what they are worth, ``fused_head``,
            ``fused_blocks``, ``fewer_operators`` and ``cudnn`` (its attention), which are on unless
            they are false; ``rows``, the positions that the head computes at once;
            ``overlap_comm``, which is DeepSpeed's; ``lora``, the rank of adapters that are trained
            instead of the weights; ``freeze``, parts that are not trained.
        loss_function: how the model is called; with its inputs and targets by default.
    """
    device = local_device() if dist.is_initialized() else init_distributed()
    grid = ProcessGrid.create(1, device)
    config = RunConfig(
        model=model_config,
        parallel=ParallelConfig(
            zero_stage=options["zero"], overlap_comm=options.get("overlap_comm", False)
        ),
        training=TrainingConfig(
            steps=1_000_000,
            global_batch_size=batch,
            micro_batch_size=batch // grid.dp_size,
            precision=options["precision"],
            lora=LoRAConfig(rank=options.get("lora")),
            freeze=options.get("freeze", ()),
        ),
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    if not options.get("fewer_operators", True):
        training_engine.use_fewer_operators = lambda optimizer, grid: None
        config = replace(config, deepspeed={"zero_optimization": {"reduce_scatter": True}})
    torch.backends.cuda.enable_cudnn_sdp(options.get("cudnn", True))
    model = build_model(
        model_config,
        grid,
        activation_checkpointing=options["recompute"],
        compile_blocks=options["compile"],
    )
    choose_trained(model, config.training)
    initialize_adapters(model, config.training.seed, grid)
    if not options.get("fused_head", True):
        model.head.loss_options = replace(model.head.loss_options, fused=False)
    if "rows" in options:
        model.head.loss_options = replace(model.head.loss_options, rows=options["rows"])
    if not options.get("fused_blocks", True):
        model.stack.fused = False
    return Engine(model, grid, config, loss_function)


def facts(engine: Engine, model_config: ModelConfig) -> dict[str, Any]:
    """Record the quantities that MFU follows from."""
    counts = meta_model(model_config)
    return {
        "parameters": counts.num_parameters(),
        "flops_per_token": counts.flops_per_token(),
        "mfu_peak": peak_flops(device_name(engine.grid.device), engine.precision),
        "precision": engine.precision,
    }
