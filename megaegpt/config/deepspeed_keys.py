"""Which raw DeepSpeed keys may stand under ``deepspeed:``, and why the others may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megaegpt.config.parsing import Problem

OWNED_KEYS: dict[str, str] = {
    "activation_checkpointing": "training.activation_checkpointing",
    "amp": "training.precision",
    "bf16.bf16_master_weights_and_grads": "training.precision",
    "bf16.enabled": "training.precision",
    "bfloat16": "training.precision",
    "checkpoint": "checkpoint",
    "data_types.grad_accum_dtype": "training.precision",
    "elasticity": "training.global_batch_size",
    "fp16.auto_cast": "training.precision",
    "fp16.enabled": "training.precision",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_allreduce_op": "the training loop, whose loss counts on an average",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "steps_per_print": "logging.interval",
    "tensor_parallel": "parallel.tensor_parallel_size",
    "tensorboard": "logging.tensorboard",
    "torch_autocast": "training.precision",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "wandb": "logging.wandb",
    "zero_force_ds_cpu_optimizer": "parallel.offload",
    "zero_optimization.cpu_offload": "parallel.offload",
    "zero_optimization.cpu_offload_param": "parallel.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "parallel.offload",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_optimization.offload_param": "parallel.offload",
    "zero_optimization.overlap_comm": "parallel.overlap_comm",
    "zero_optimization.stage": "parallel.zero_stage",
}
"""Raw keys that something else in a run decides, and what does."""

_OTHER_OPTIMIZER = "it has an optimizer of its own, whose state checkpoints here do not hold"
_LOADER = "DeepSpeed's data loader, which it is for, is not used"
_STAGE_3 = "it belongs to ZeRO stage 3: set parallel.zero_stage=3"
_SECOND_PARTITION = "checkpoints here know of one partition of each parameter, in its own precision"
_UNSUPPORTED_KEYS: dict[str, str] = {
    "autotuning": "it is for DeepSpeed's autotuner, which starts runs of its own",
    "data_efficiency": _LOADER,
    "dataloader_drop_last": _LOADER,
    "pipeline": "it is for DeepSpeed's pipeline engine, which is not used",
    "zero_optimization.memory_efficient_linear": "it has a wrong sum under "
    "training.activation_checkpointing=selective, and products here save that memory in any case",
    "zero_optimization.round_robin_gradients": "it puts optimizer states in an order that "
    "checkpoints here do not know",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "whole weights are exported "
    "into each checkpoint in any case",
    "zero_optimization.super_offload": _OTHER_OPTIMIZER,
    "zero_optimization.zenflow": _OTHER_OPTIMIZER,
    "zero_optimization.zero_hpz_partition_size": _SECOND_PARTITION,
    "zero_optimization.zero_quantized_gradients": _SECOND_PARTITION,
    "zero_optimization.zero_quantized_nontrainable_weights": _SECOND_PARTITION,
    "zero_optimization.zero_quantized_weights": _SECOND_PARTITION,
}
_DEFAULT_ALONE: dict[str, tuple[Any, str]] = {
    "fp16.loss_scale": (
        0,
        "the loss scale follows the gradients, and is lowered where they overflow",
    ),
    "zero_optimization.compute_grad_norm": (True, "every step's gradient norm is recorded"),
    "zero_optimization.elastic_checkpoint": (
        False,
        "checkpoints here are brought to another topology without it, and cannot be loaded with it",
    ),
}
"""Keys that may have DeepSpeed's default, which is given with the reason against others."""
_STAGE_3_PREFIX = "zero_optimization.stage3_"

_POSITIVE_KEYS = (
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.sub_group_size",
)
_NON_NEGATIVE_KEYS = (
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
)


def deepspeed_problems(raw: dict[str, Any], zero_stage: int) -> Iterator[Problem]:
    """Find the keys that cannot stand in the section ``deepspeed`` of a run's configuration.

    Args:
        raw: the section.
        zero_stage: ``parallel.zero_stage``.

    Keys that are not listed in this module are DeepSpeed's to judge, which refuses those that it
    does not know: see :func:`megaegpt.training.engine.compat.check_accepted`.
    """
    if not isinstance(zero := raw.get("zero_optimization", {}), dict):
        name = "deepspeed.zero_optimization"
        yield Problem((name,), f"{name} must be a mapping of keys to values, not {zero}")
    given = dict(dotted_keys(raw))
    for key, value in given.items():
        name = f"deepspeed.{key}"
        if key in OWNED_KEYS:
            yield Problem((name,), f"{name} is set by {OWNED_KEYS[key]}: remove it")
        elif key in _UNSUPPORTED_KEYS:
            yield Problem((name,), f"{name} cannot be used: {_UNSUPPORTED_KEYS[key]}")
        elif key in _DEFAULT_ALONE and value != _DEFAULT_ALONE[key][0]:
            yield Problem(
                (name,), f"{name}={str(value).lower()} cannot be used: {_DEFAULT_ALONE[key][1]}"
            )
        elif key.startswith(_STAGE_3_PREFIX) and zero_stage != 3:
            yield Problem((name,), f"{name} cannot be used: {_STAGE_3}")
        elif key in _POSITIVE_KEYS and not _is_integer_from(1, value):
            yield Problem((name,), f"{name}={value} must be an integer greater than 0")
        elif key in _NON_NEGATIVE_KEYS and not _is_integer_from(0, value):
            yield Problem((name,), f"{name}={value} must be an integer of at least 0")


def without_stage_3_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """The section ``deepspeed`` for another stage: keys that stage 3 alone has are left out."""
    section, prefix = "zero_optimization", _STAGE_3_PREFIX.partition(".")[2]
    if not isinstance(raw.get(section), dict):
        return raw
    kept = {key: value for key, value in raw[section].items() if not key.startswith(prefix)}
    return {**raw, section: kept}


def dotted_keys(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested mappings, those that hold mappings too, with its value."""
    for key, value in section.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")


def _is_integer_from(least: int, value: Any) -> bool:
    """Also of a float such as 5e7, which is how bucket sizes are often written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= least and float(value).is_integer() and value < 2**63
