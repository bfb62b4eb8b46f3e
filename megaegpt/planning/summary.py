"""The quantities derived from a configuration: sizes, batch, operations, memory. Printed before
step 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.parallel import effective_zero_stage
from megaegpt.config.parameter_groups import assign_groups
from megaegpt.model.adapters import choose_trained
from megaegpt.model.build import meta_model
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import encoding_flops
from megaegpt.model.flops import attention_flops
from megaegpt.planning.memory import MemoryEstimate
from megaegpt.precision import Precision
from megaegpt.text_tables import short_count


@dataclass(frozen=True)
class ModelSize:
    """Counts of the whole model over all TP ranks."""

    parameters: int
    """Trainable."""
    flops_per_token: int
    """Operations of training on one token, the encoder's forward pass included where it runs in
    the loop, and frozen parts that do as if they were trained."""
    frozen: int = 0
    """Parameters of frozen parts."""
    encoder_parameters: int = 0
    """Parameters of the frozen encoder."""


def measure_model(
    config: RunConfig, encoder: ModelConfig | None = None, sample_tokens: float | None = None
) -> ModelSize:
    """Count without allocating.

    Args:
        encoder: the frozen GPT of egpt and deepgpt.
        sample_tokens: of a sample on average, which a gpt's attention costs go by; None: all are as
            long as the model takes.

    Raises:
        ConfigError: ``training.freeze``, ``training.lora`` or ``optimizer.groups`` names what the
            model does not have.
    """
    model = meta_model(config.model)
    frozen = choose_trained(model, config.training)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assign_groups(trained, config.optimizer.groups)
    if config.data.predictions == "stored" and isinstance(model, EGPT):
        flops = model.memory_flops_per_token()
    else:
        flops = model.flops_per_token()
    if sample_tokens is not None and not config.model.needs_encoder:
        whole, seen = config.model.max_seq_len, round(sample_tokens)
        if seen < whole:
            flops -= 3 * (
                attention_flops(config.model, whole) - attention_flops(config.model, seen)
            )
    if encoder is None:
        return ModelSize(model.num_parameters() - frozen, flops, frozen)
    gpt = meta_model(encoder)
    if config.data.token_features == "online":
        flops += encoding_flops(encoder, config.model.egpt.chunk_size, config.model.encoder.overlap)
    return ModelSize(model.num_parameters() - frozen, flops, frozen, gpt.num_parameters())


def describe_run(
    config: RunConfig,
    size: ModelSize,
    dp_size: int,
    precision: Precision,
    device: str,
    memory: MemoryEstimate | None = None,
    sample_tokens: float | None = None,
    total_tokens: int | None = None,
) -> list[str]:
    """The derived quantities, a line each.

    Args:
        dp_size: data-parallel ranks.
        precision: what ``auto`` has become.
        device: its name.
        memory: of a rank; a running job measures it instead.
        sample_tokens: of a sample on average; None: all are as long as the model takes.
        total_tokens: of the run; None: those of samples and steps that are all as configured.
    """
    training, tp = config.training, config.parallel.tensor_parallel_size
    cp = config.parallel.context_parallel_size
    over_context = f" x {cp} context-parallel" if cp > 1 else ""
    stage = effective_zero_stage(config.parallel.zero_stage, precision)
    offload = config.parallel.offload
    offloaded = "" if offload == "none" else f" ({offload} in host memory)"
    accumulation = config.gradient_accumulation(dp_size)
    tokens: float = config.model.sample_len
    samples = f"samples of {tokens:,}"
    if sample_tokens is not None and sample_tokens != tokens:
        tokens, samples = sample_tokens, f"samples of {sample_tokens:,.0f} on average"
    per_step = round(training.global_batch_size * tokens)
    if total_tokens is None:
        total_tokens = round(config.batches.samples_before(training.steps) * tokens)
    lines = {
        "model": f"{config.model.kind}, {size.parameters:,} trainable parameters",
        "ranks": f"{tp * cp * dp_size} = {tp} tensor-parallel{over_context} x {dp_size} "
        f"data-parallel, ZeRO stage {stage}{offloaded}, {precision} on {device}",
        "step": f"{per_step:,} tokens = {training.global_batch_size} {samples} = "
        f"{dp_size} ranks x {accumulation} micro-steps x {training.chosen_micro_batch_size}",
        "run": f"{training.steps:,} steps, {short_count(total_tokens)} tokens",
        "operations": f"{short_count(size.flops_per_token)}FLOP a token, "
        f"{short_count(size.flops_per_token * per_step)}FLOP a step",
    }
    if training.batch_ramp.start is not None:
        sizes = ", ".join(map(str, config.batches.sizes()))
        lines["step"] += f" (after {config.batches.ramp_steps:,} steps of the batch ramp: {sizes})"
    if memory is not None:
        lines["memory"] = str(memory)
    if size.frozen:
        rank = training.lora.rank
        parts = ", ".join(training.freeze) if rank is None else f"under adapters of rank {rank}"
        lines["model"] += f", {size.frozen:,} frozen ({parts})"
    if size.encoder_parameters:
        lines["model"] += f" over a frozen encoder of {size.encoder_parameters:,}"
    return [f"{name:<11}{text}" for name, text in lines.items()]
