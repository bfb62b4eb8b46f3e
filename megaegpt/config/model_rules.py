"""Rules of a model: what heads, positions, latents, windows, chunks and ranks ask of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from megaegpt.config.model import ModelConfig
from megaegpt.config.parsing import Problem

CONDITIONS: dict[str, Callable[[ModelConfig], bool]] = {
    "num_kv_heads": lambda model: model.attention == "grouped_query",
    "latent_dim": lambda model: model.attention == "latent",
    "query_latent_dim": lambda model: model.attention == "latent",
    "latent_norm": lambda model: model.attention == "latent",
    "rope_base": lambda model: model.positions == "rotary",
    "rope_pairs": lambda model: model.positions == "rotary",
    "activation": lambda model: model.mlp != "swiglu" or model.kind == "egpt",  # its input MLP's
    "window_every": lambda model: model.window is not None,
    "tied_embeddings": lambda model: model.kind == "gpt",
    "egpt.chunk_size": lambda model: model.kind != "gpt",
    "egpt.memory_dim": lambda model: model.has_token_memory,
    "egpt.memory_pointers": lambda model: model.has_token_memory,
    "egpt.memory_chunks": lambda model: model.has_token_memory,
    "encoder.layers": lambda model: model.kind != "gpt",
    "encoder.overlap": lambda model: model.kind != "gpt",
}
"""Where a key has an effect, if not everywhere; the other keys of ``egpt`` are an egpt's."""

_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
_LEAST, _MOST = 1e-30, 1e30  # beyond all use, and far from where fp64 ends


def has_effect(model: ModelConfig, key: str) -> bool:
    """Whether a key of the ``model`` section, such as ``egpt.history``, means something for it."""
    if key in CONDITIONS:
        return CONDITIONS[key](model)
    return not key.startswith("egpt.") or model.kind == "egpt"


def model_problems(model: ModelConfig, tp: int) -> Iterator[Problem]:
    """Yield the reasons why ``model`` cannot be built on ``tp`` tensor-parallel ranks; sizes are
    positive.
    """
    for rule in (_heads, _positions, _rotary, _latent, _window, _documents, _chunks_and_encoder):
        yield from rule(model)
    yield from _divisible_by_tp(model, tp)


def _heads(model: ModelConfig) -> Iterator[Problem]:
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield Problem(
            ("model.hidden_size", "model.num_heads"),
            f"model.hidden_size={model.hidden_size} is not divisible by "
            f"model.num_heads={model.num_heads}: change one, or give model.head_dim",
        )
    if model.num_heads % model.kv_heads:
        yield Problem(
            ("model.num_heads", "model.num_kv_heads"),
            f"model.num_heads={model.num_heads} is not divisible by "
            f"model.num_kv_heads={model.num_kv_heads}: use one of {_divisors(model.num_heads)}",
        )


def _positions(model: ModelConfig) -> Iterator[Problem]:
    if model.positions == "sinusoidal" and model.hidden_size % 2:
        yield Problem(
            ("model.positions", "model.hidden_size"),
            f"model.positions=sinusoidal needs an even model.hidden_size, not {model.hidden_size}",
        )


def _rotary(model: ModelConfig) -> Iterator[Problem]:
    scaling = model.rope_scaling
    rotated = model.attention == "grouped_query" and model.positions == "rotary"
    if model.rope_fraction != 1.0 and not rotated:
        yield Problem(
            ("model.rope_fraction", "model.positions", "model.attention"),
            f"model.rope_fraction={model.rope_fraction} has no effect without "
            "model.positions=rotary and model.attention=grouped_query",
        )
    elif rotated and (model.rope_size == 0 or model.rope_size % 2):
        yield Problem(
            ("model.rope_fraction", "model.head_dim", "model.hidden_size", "model.num_heads"),
            "model.positions=rotary turns pairs of values: model.rope_fraction="
            f"{model.rope_fraction} of the head width {model.head_size} must be an even number, "
            f"not {model.rope_size}",
        )
    if scaling.kind != "none" and model.positions != "rotary":
        yield Problem(
            ("model.rope_scaling.kind", "model.positions"),
            f"model.rope_scaling.kind={scaling.kind} has no effect without model.positions=rotary",
        )
    for name in ("rope_base", *(f"rope_scaling.{key}" for key in _ROPE_NUMBERS)):
        value = getattr(scaling, name.removeprefix("rope_scaling."), model.rope_base)
        if not _LEAST <= value <= _MOST:
            yield Problem(
                (f"model.{name}",),
                f"model.{name}={value} must be from {_LEAST} to {_MOST}: frequencies are powers "
                "and ratios of it",
            )
    if scaling.kind == "none" and scaling.factor != 1.0:
        yield Problem(
            ("model.rope_scaling.kind", "model.rope_scaling.factor"),
            f"model.rope_scaling.factor={scaling.factor} has no effect without "
            "model.rope_scaling.kind",
        )
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield Problem(
            ("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor"),
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor} must be above "
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor}",
        )
    if scaling.kind == "yarn" and model.rope_base <= 1:
        yield Problem(
            ("model.rope_scaling.kind", "model.rope_base"),
            "model.rope_scaling.kind=yarn divides the frequencies of slow pairs: "
            f"model.rope_base={model.rope_base} must be above 1, so that later pairs are slower",
        )
    if scaling.kind == "yarn" and scaling.beta_fast <= scaling.beta_slow:
        yield Problem(
            ("model.rope_scaling.beta_fast", "model.rope_scaling.beta_slow"),
            f"model.rope_scaling.beta_fast={scaling.beta_fast} must be above "
            f"model.rope_scaling.beta_slow={scaling.beta_slow}",
        )


def _latent(model: ModelConfig) -> Iterator[Problem]:
    example = max(2, model.head_size // 4 * 2)
    decoupled = model.attention == "latent" and model.positions == "rotary"
    if decoupled and (model.rope_head_dim is None or model.rope_head_dim % 2):
        yield Problem(
            ("model.attention", "model.positions", "model.rope_head_dim"),
            "model.attention=latent with model.positions=rotary needs an even "
            f"model.rope_head_dim, for example {example}, not {model.rope_head_dim}",
        )
    if not decoupled and model.rope_head_dim is not None:
        yield Problem(
            ("model.attention", "model.positions", "model.rope_head_dim"),
            f"model.rope_head_dim={model.rope_head_dim} has no effect: it belongs to "
            "model.attention=latent with model.positions=rotary",
        )
    if model.attention == "latent" and model.num_kv_heads is not None:
        yield Problem(
            ("model.attention", "model.num_kv_heads"),
            f"model.num_kv_heads={model.num_kv_heads} has no effect with model.attention=latent: "
            "its cache is set by model.latent_dim",
        )
    for name in ("latent_dim", "query_latent_dim"):
        value = getattr(model, name)
        if model.attention != "latent" and value is not None:
            yield Problem(
                ("model.attention", f"model.{name}"),
                f"model.{name}={value} has no effect without model.attention=latent",
            )
    if model.attention == "latent" and model.qk_norm != "none":
        yield Problem(
            ("model.attention", "model.qk_norm"),
            f"model.qk_norm={model.qk_norm} cannot be combined with model.attention=latent: "
            "its latents have norms of their own (model.latent_norm)",
        )
    if model.attention == "latent" and model.qkv_bias is not None:
        yield Problem(
            ("model.attention", "model.qkv_bias"),
            f"model.qkv_bias={str(model.qkv_bias).lower()} has no effect with "
            "model.attention=latent",
        )
    if model.attention != "latent" and not model.latent_norm:
        yield Problem(
            ("model.attention", "model.latent_norm"),
            "model.latent_norm=false has no effect without model.attention=latent",
        )


def _window(model: ModelConfig) -> Iterator[Problem]:
    if model.window is not None and model.attention == "latent":
        yield Problem(
            ("model.window", "model.attention"),
            f"model.window={model.window} cannot be combined with model.attention=latent",
        )
    if model.window_every is not None and model.window is None:
        yield Problem(
            ("model.window", "model.window_every"),
            f"model.window_every={model.window_every} has no effect without model.window",
        )


def _documents(model: ModelConfig) -> Iterator[Problem]:
    end = model.document_end
    if end is None:
        return
    if end >= model.vocab_size:
        yield Problem(
            ("model.document_end", "model.vocab_size"),
            f"model.document_end={end} is no token of the vocabulary: "
            f"model.vocab_size={model.vocab_size}",
        )
    if model.kind != "gpt":
        yield Problem(
            ("model.document_end", "model.kind"),
            f"model.document_end={end} has no effect with model.kind={model.kind}: "
            "set it on the encoder",
        )


def _divisible_by_tp(model: ModelConfig, tp: int) -> Iterator[Problem]:
    key = "parallel.tensor_parallel_size"
    if model.num_heads % tp:
        yield Problem(
            ("model.num_heads", key),
            f"model.num_heads={model.num_heads} is not divisible by {key}={tp}: "
            f"use one of {_divisors(model.num_heads)}",
        )
    elif model.attention == "grouped_query" and model.kv_heads % tp and tp % model.kv_heads:
        yield Problem(
            ("model.num_kv_heads", "model.num_heads", key),
            f"model.num_kv_heads={model.kv_heads} and {key}={tp}: one must divide the other",
        )
    if model.qk_norm == "projection" and model.kv_heads < tp:
        yield Problem(
            ("model.qk_norm", "model.num_kv_heads", key),
            f"model.qk_norm=projection is over all {model.kv_heads} key heads, of which each rank "
            f"has at least one: {key}={tp} is too large",
        )
    if model.ffn_size % tp:
        yield Problem(
            ("model.ffn_hidden_size", "model.hidden_size", key),
            f"model.ffn_hidden_size={model.ffn_size} is not divisible by {key}={tp}",
        )
    if model.padded_vocab_size % tp:
        yield Problem(
            ("model.vocab_size", key),
            f"model.vocab_size={model.vocab_size}, padded to {model.padded_vocab_size}, "
            f"is not divisible by {key}={tp}",
        )


def _chunks_and_encoder(model: ModelConfig) -> Iterator[Problem]:
    if model.kind == "gpt":
        return
    chunks = model.egpt
    if model.encoder.overlap > chunks.chunk_size:
        yield Problem(
            ("model.encoder.overlap", "model.egpt.chunk_size"),
            f"model.encoder.overlap={model.encoder.overlap} is more than a chunk of "
            f"model.egpt.chunk_size={chunks.chunk_size}",
        )
    if chunks.attention_sink:
        yield from _sink_problems(model)
    for name in ("memory_gate", "token_memory"):
        if not chunks.history and getattr(chunks, name):
            yield Problem(
                (f"model.egpt.{name}", "model.egpt.history"),
                f"model.egpt.{name}=true has no effect with model.egpt.history=false",
            )
    if not model.encoder.source:
        yield Problem(
            ("model.kind", "model.encoder.source"),
            f"model.encoder.source is required for model.kind={model.kind}: "
            "the folder of the frozen encoder's weights",
        )


def _sink_problems(model: ModelConfig) -> Iterator[Problem]:
    named = "model.egpt.attention_sink=true"
    if not model.egpt.local_attention:
        yield Problem(
            ("model.egpt.attention_sink", "model.egpt.local_attention"),
            f"{named} has no effect without model.egpt.local_attention",
        )
    if model.window is not None:
        yield Problem(
            ("model.egpt.attention_sink", "model.window"),
            f"{named} is not seen by most tokens within model.window={model.window}: leave one out",
        )


def _divisors(number: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return ", ".join(map(str, sorted({*small, *(number // d for d in small)})))
