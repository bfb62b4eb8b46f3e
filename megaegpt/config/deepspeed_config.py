"""DeepSpeed's JSON, generated from a run's configuration."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from megaegpt.config.parallel import effective_zero_stage
from megaegpt.config.run import RunConfig

if TYPE_CHECKING:  # a configuration needs no torch
    from megaegpt.precision import Precision

_BUCKET_ELEMENTS = 2**28
"""Most gradients reduced at once where reduction follows the backward pass: few, large messages."""
_OVERLAPPED_BUCKET_ELEMENTS = 25_000_000
"""Most gradients reduced at once beside the backward pass: 50 MB in half precision are enough to
use a link fully, and GPT-2 124M fills five of them, so that four are sent while it computes."""


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
        data_parallel_size: ranks with samples of their own.
        parameters: trainable parameters of this rank, which bound the communication buffers.
    """
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    overlap = config.parallel.overlap_comm
    largest = _OVERLAPPED_BUCKET_ELEMENTS if overlap else _BUCKET_ELEMENTS
    bucket = min(largest, parameters + parameters % 2)  # DeepSpeed wants an even number
    generated: dict[str, Any] = {
        # Context-parallel ranks count as data-parallel ones, though they have the same samples.
        "train_batch_size": config.training.global_batch_size
        * config.parallel.context_parallel_size,
        "train_micro_batch_size_per_gpu": config.training.chosen_micro_batch_size,
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
    if config.optimizer.kind == "muon":
        # It knows its own kinds of optimizers alone; layouts are told to ours, and tested.
        generated["zero_allow_untested_optimizer"] = True
    if stage == 1 and precision != "fp32":
        # It would cast the gradients that it accumulated in fp32 down to send them, and back. They
        # are sent once a step here; at stage 2 they are sent as the backward pass makes them.
        generated["communication_data_type"] = "fp32"
    if stage == 3:
        del generated["zero_optimization"]["allgather_bucket_size"]  # it gathers layer by layer
        # Its function for products adds biases in place, so twice where results are kept and the
        # rest is computed again; ``parallel.matmul`` has what it is for.
        generated["zero_optimization"]["memory_efficient_linear"] = False
        _offload(config, generated)
    if stage == 2 or (stage == 1 and precision != "bf16"):
        # It sums whole buckets in any case. Told so, it copies no gradient to another buffer and
        # back; and what is divided by the number of ranks first cannot overflow in fp16.
        generated["zero_optimization"]["reduce_scatter"] = False
        generated["prescale_gradients"] = not _is_scaled_otherwise(config.deepspeed)
    return _merge(generated, config.deepspeed)


def _offload(config: RunConfig, generated: dict[str, Any]) -> None:
    """Leave to host memory what ``parallel.offload`` says."""
    if config.parallel.offload == "none":
        return
    on_host = {"device": "cpu", "pin_memory": True}
    generated["zero_optimization"]["offload_optimizer"] = on_host
    if config.parallel.offload == "parameters":
        generated["zero_optimization"]["offload_param"] = dict(on_host)
    # torch's fused AdamW updates on a CPU by vector instructions and threads as DeepSpeed's does,
    # which would have to be compiled first.
    generated["zero_force_ds_cpu_optimizer"] = False


def _is_scaled_otherwise(raw: dict[str, Any]) -> bool:
    """Whether raw keys ask for what DeepSpeed cannot do if it divides before it sums."""
    zero = raw.get("zero_optimization")
    scatters = isinstance(zero, dict) and bool(zero.get("reduce_scatter"))
    return scatters or "gradient_predivide_factor" in raw


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
