"""Models of Hugging Face's families with random weights, in the shapes that tests can afford."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    modeling_rope_utils,
)

VOCAB, LENGTH, ORIGINAL = 101, 40, 10
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
}
_GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_inner": 44,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": LENGTH,
}
_CLASSES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def _scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0, **values}, "rope_theta": 500.0}


_BY_LAYER = ["sliding_attention", "sliding_attention", "full_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_of_one_key_head": ("llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "llama_with_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_geglu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_exact_geglu": ("llama", {"hidden_act": "gelu"}),
    "llama_linear": ("llama", _scaled("linear")),
    "llama3": (
        "llama",
        _scaled(
            "llama3",
            original_max_position_embeddings=ORIGINAL,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ),
    "llama_yarn": ("llama", _scaled("yarn", original_max_position_embeddings=ORIGINAL)),
    "qwen3_yarn": (
        "qwen3",
        _scaled(
            "yarn",
            original_max_position_embeddings=ORIGINAL,
            beta_fast=5.0,
            mscale=1.0,
            mscale_all_dim=0.5,
        ),
    ),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral_without_window": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_with_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3_with_windows_by_layer": (
        "qwen3",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": _BY_LAYER,
            "head_dim": 6,
        },
    ),
    "olmo2": ("olmo2", {"pad_token_id": None}),  # else the gradient of that token is left out
}
"""By name: the family, and what is not as in the others."""


def random_model(case: str, **changes: Any) -> PreTrainedModel:
    """Every tensor is drawn in fp32, biases and norms too, widely enough that each of them
    matters.
    """
    family, own = CASES[case]
    config_class, model_class = _CLASSES[family]
    sizes = _GPT2_SIZES if family == "gpt2" else _SIZES
    model = model_class(config_class(**sizes | own | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3, generator=generator)
    return model


def sequences(length: int = LENGTH, rows: int = 2, seed: int = 2) -> Tensor:
    """(rows, length) ids."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- all of it in fp64 ----------------------------------------------------------------------------


class _InFp64:
    """torch, in which fp32 is fp64: transformers computes frequencies in fp32 by name."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


class _ExactRotary(nn.Module):
    def __init__(self, frequencies: Tensor, factor: float) -> None:
        super().__init__()
        self.frequencies, self.factor = frequencies, factor

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


def _exact_norm(norm: Any, x: Tensor) -> Tensor:
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * scaled


def in_fp64(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in fp64 with its norms and rotary tables, which are fp32 whatever its type."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_exact_norm, module)
    if not hasattr(model.base_model, "rotary_emb"):
        return model
    config = model.config
    kind, factor = config.rope_parameters["rope_type"], 1.0
    if kind == "default":
        size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        steps = torch.arange(0, size, 2, dtype=torch.float64) / size
        frequencies = torch.exp(-math.log(config.rope_parameters["rope_theta"]) * steps)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_rope_utils, "torch", _InFp64())
            frequencies, factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config)
        assert frequencies.dtype == torch.float64
    model.base_model.rotary_emb = _ExactRotary(frequencies, factor)
    return model
