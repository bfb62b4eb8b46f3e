"""DeepSpeed's JSON, generated from a run's configuration."""

from __future__ import annotations

import copy
from typing import Any

from megaegpt.config.run import RunConfig
from megaegpt.errors import ConfigError
from megaegpt.precision import Precision

_BUCKET_ELEMENTS = 2**28
"""Most gradients reduced at once where reduction follows the backward pass: few, large messages."""
_OVERLAPPED_BUCKET_ELEMENTS = 25_000_000
"""Most gradients reduced at once beside the backward pass: 50 MB in half precision are enough to
use a link fully, and GPT-2 124M fills five of them, so that four are sent while it computes."""


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

    DeepSpeed copies gradients into a bucket as the backward pass makes them, and reduces the bucket
    when the next gradient does not fit into it; whatever is left is reduced after the pass. So
    ``overlap_comm`` hides communication only if the model fills several buckets. It then keeps two
    of them, and fills one while the other is reduced on a stream of its own: that memory is the
    price. Without overlap there is one bucket, no larger than the model.

    Args:
        config: a checked configuration, whose ``deepspeed`` section replaces single values here.
        parameters: trainable parameters of this rank, which bound the communication buffers.
    """
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    overlap = config.parallel.overlap_comm
    largest = _OVERLAPPED_BUCKET_ELEMENTS if overlap else _BUCKET_ELEMENTS
    bucket = min(largest, parameters + parameters % 2)  # DeepSpeed wants an even number
    generated: dict[str, Any] = {
        "train_batch_size": config.training.global_batch_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation(data_parallel_size),
        # Explicit: DeepSpeed clips at 1.0 when the key is absent. ClippedAdamW clips for stage 0.
        "gradient_clipping": config.training.gradient_clipping if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": overlap,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device every step
    }
    return _merge(generated, config.deepspeed)


def check_accepted(options: dict[str, Any]) -> None:
    """Let DeepSpeed read ``options`` before any memory is spent on them.

    Args:
        options: what :func:`deepspeed_config` gives.

    Raises:
        ConfigError: one line for each value that DeepSpeed does not accept.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    # The micro-batch alone agrees with any number of ranks, which DeepSpeed does not know yet.
    batch = ("train_batch_size", "gradient_accumulation_steps")
    read = {key: copy.deepcopy(value) for key, value in options.items() if key not in batch}
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        text = "; ".join(found)
    except (AssertionError, AttributeError, DeepSpeedConfigError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
    else:
        return
    raise ConfigError(f"DeepSpeed refuses the keys under deepspeed: {text}")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``extra``, section by section; neither is altered."""
    merged = dict(base)
    for key, value in extra.items():
        known = merged.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merged[key] = _merge(known, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
