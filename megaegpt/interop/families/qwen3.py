"""Qwen 3 (arXiv 2505.09388): Llama with a norm of each head's queries and keys."""

from __future__ import annotations

from megaegpt.interop.families.family import Family
from megaegpt.interop.families.rope_keys import ROPE
from megaegpt.interop.families.shared import (
    ACTIVATION,
    CONSTANTS,
    GENERAL_KEYS,
    GGUF_KEYS,
    LINEAR_PLACES,
    LLAMA_FIXED,
    PRE_NORM_PLACES,
    QK_NORM_PLACES,
    llama_keys,
)
from megaegpt.interop.families.window_keys import BY_LAYER

QWEN3 = Family(
    title="Qwen 3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    body="model.",
    gguf="qwen3",
    constants=CONSTANTS | {"qk_norm": "head"},
    keys=llama_keys(
        vocab_size=151936,
        intermediate_size=22016,
        max_position_embeddings=32768,
        num_key_value_heads=32,
        head_dim=128,
    ),
    concerns=(ACTIVATION, ROPE, BY_LAYER),
    fixed=LLAMA_FIXED | {"attention_bias": (False,)},
    ignored=GENERAL_KEYS,
    places=LINEAR_PLACES | PRE_NORM_PLACES | QK_NORM_PLACES,
    gguf_keys=GGUF_KEYS,
)
