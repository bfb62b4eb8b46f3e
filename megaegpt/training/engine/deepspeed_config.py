"""DeepSpeed's JSON, generated from a run's configuration."""

from __future__ import annotations

import copy
from typing import Any

from megaegpt.config.run import RunConfig
from megaegpt.errors import ConfigError
from megaegpt.precision import Precision

_BUCKET_ELEMENTS = 2**28
"""Gradients reduced at once; a smaller model needs a smaller buffer."""

_OWNERS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.overlap_comm": "parallel.overlap_comm",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.schedule",
}
"""DeepSpeed keys that say what one of our keys says already."""


def effective_zero_stage(stage: int, precision: Precision) -> int:
    """The stage DeepSpeed is given.

    Half precision needs fp32 master weights, which DeepSpeed's stage 0 keeps in an optimizer that
    counts sharded gradients wrongly under tensor parallelism and accumulates in half precision.
    Stage 1 costs the same communication and less memory, so it serves for 0 there.
    """
    return max(stage, 1) if precision != "fp32" else stage


def deepspeed_config(
    config: RunConfig, data_parallel_size: int, precision: Precision, parameters: int
) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``.

    Args:
        parameters: trainable parameters of this rank, which bound the communication buffers.

    Raises:
        ConfigError: raw keys under ``deepspeed:`` that contradict other sections.
    """
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    bucket = min(_BUCKET_ELEMENTS, parameters + parameters % 2)  # DeepSpeed wants an even number
    generated: dict[str, Any] = {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation(data_parallel_size),
        # Explicit: DeepSpeed clips at 1.0 when the key is absent. ClippedAdamW clips for stage 0.
        "gradient_clipping": config.training.gradient_clipping if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": config.parallel.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device every step
    }
    raw = copy.deepcopy(config.deepspeed)
    _check_contradictions(raw, generated, config.training.gradient_clipping)
    return _merge(generated, raw)


def _check_contradictions(raw: dict[str, Any], generated: dict[str, Any], clipping: float) -> None:
    ours: dict[str, Any] = {**generated, "gradient_clipping": clipping}
    problems = []
    for path, owner in _OWNERS.items():
        value, expected = _lookup(raw, path), _lookup(ours, path)
        if value is not None and value != expected:
            problems.append(f"deepspeed.{path}={value!r} contradicts {owner}")
    if problems:
        raise ConfigError("; ".join(problems) + ": set our key and leave the raw one out")
    if raw.get("gradient_clipping") is not None:
        del raw["gradient_clipping"]


def _lookup(tree: dict[str, Any], path: str) -> Any:
    node: Any = tree
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            value = _merge(known, value)
        merged[key] = value
    return merged
