"""What follows from a configuration: sizes, batch, operations, memory. Printed before step 0."""

from __future__ import annotations

from dataclasses import dataclass

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.model.build import meta_model
from megaegpt.model.flops import attention_flops, matmul_flops
from megaegpt.training.metrics import short_count

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class ModelSize:
    """Counts of the whole model over all TP ranks."""

    parameters: int
    """Trainable."""
    flops_per_token: int
    """Of training on one token, the encoder's forward pass included where it runs in the loop."""
    encoder_parameters: int = 0
    """Frozen."""


def measure_model(config: RunConfig, encoder: ModelConfig | None = None) -> ModelSize:
    """Count without allocating.

    Args:
        encoder: the frozen GPT of egpt and deepgpt.
    """
    model = meta_model(config.model)
    flops = model.flops_per_token()
    if encoder is None:
        return ModelSize(model.num_parameters(), flops)
    gpt = meta_model(encoder)
    if config.data.token_features == "online":
        flops += matmul_flops(gpt.stack)
        flops += attention_flops(encoder, config.model.egpt.chunk_size)
    return ModelSize(model.num_parameters(), flops, gpt.num_parameters())


def tokens_per_step(config: RunConfig) -> int:
    """Predicted tokens of a global batch."""
    return config.training.global_batch_size * config.model.sample_len


def describe_run(
    config: RunConfig, size: ModelSize, dp_size: int, precision: str, device: str
) -> list[str]:
    """The derived quantities, a line each.

    Args:
        dp_size: data-parallel ranks.
        precision: what ``auto`` has become.
        device: its name.
    """
    training, tp = config.training, config.parallel.tensor_parallel_size
    accumulation = config.gradient_accumulation(dp_size)
    per_step = tokens_per_step(config)
    lines = {
        "model": f"{config.model.kind}, {size.parameters:,} trainable parameters",
        "ranks": f"{tp * dp_size} = {tp} tensor-parallel x {dp_size} data-parallel, ZeRO stage "
        f"{config.parallel.zero_stage}, {precision} on {device}",
        "step": f"{per_step:,} tokens = {training.global_batch_size} samples of "
        f"{config.model.sample_len:,} = {dp_size} ranks x {accumulation} micro-steps x "
        f"{training.micro_batch_size}",
        "run": f"{training.steps:,} steps, {short_count(training.steps * per_step)} tokens",
        "operations": f"{short_count(size.flops_per_token)}FLOP a token, "
        f"{short_count(size.flops_per_token * per_step)}FLOP a step",
        "memory": describe_memory(config, size, dp_size, precision),
    }
    if size.encoder_parameters:
        lines["model"] += f" over a frozen encoder of {size.encoder_parameters:,}"
    return [f"{name:<11}{text}" for name, text in lines.items()]


def describe_memory(config: RunConfig, size: ModelSize, dp_size: int, precision: str) -> str:
    """Estimate of a rank's memory in training."""
    parts = estimate_memory(config, size, dp_size, precision)
    listed = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in parts.items() if count)
    return f"about {sum(parts.values()) / 2**30:.2f} GiB a rank ({listed})"


def estimate_memory(
    config: RunConfig, size: ModelSize, dp_size: int, precision: str
) -> dict[str, int]:
    """Bytes of a rank by purpose. Activations follow Korthikanti et al. (arXiv 2205.05198), with
    attention scores never stored; communication buffers and fragmentation are not counted.
    """
    tp, stage = config.parallel.tensor_parallel_size, config.parallel.zero_stage
    item = _BYTES[precision]
    own = size.parameters // tp
    gradients = own * 4 // (dp_size if stage >= 2 else 1)
    states = own * (8 if precision == "fp32" else 12) // (dp_size if stage >= 1 else 1)
    return {
        "weights": own * item,
        "gradients": gradients,
        "optimizer": states,
        "encoder": size.encoder_parameters // tp * item,
        "activations": _activation_bytes(config, item),
    }


def _activation_bytes(config: RunConfig, item: int) -> int:
    model, tp = config.model, config.parallel.tensor_parallel_size
    positions = config.training.micro_batch_size * model.sample_len
    everything = 5 + 12 / tp  # values of a position and channel that a block keeps
    kept = {"none": everything, "selective": 3 + 8 / tp, "full": 1.0}
    a_layer = kept[config.training.activation_checkpointing]
    total = model.num_layers * a_layer + (everything if a_layer < everything else 0)
    return int(positions * model.hidden_size * item * total)
