"""Qwen 2 and 2.5 (arXiv 2407.10671): Llama with biases of queries, keys and values."""

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
    llama_keys,
)
from megaegpt.interop.families.window_keys import BY_LAYER

QWEN2 = Family(
    title="Qwen 2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    body="model.",
    gguf="qwen2",
    constants=CONSTANTS | {"qkv_bias": True},
    keys=llama_keys(
        vocab_size=151936,
        intermediate_size=22016,
        max_position_embeddings=32768,
        num_key_value_heads=32,
    ),
    concerns=(ACTIVATION, ROPE, BY_LAYER),
    fixed=LLAMA_FIXED | {"use_mrope": (False,)},
    ignored=GENERAL_KEYS,
    places=LINEAR_PLACES | PRE_NORM_PLACES,
    gguf_keys=GGUF_KEYS,
)
