"""Mistral (Jiang et al., arXiv 2310.06825): Llama with a sliding window in every layer."""

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
    ROTARY_BUFFERS,
    llama_keys,
)
from megaegpt.interop.families.window_keys import EVERY_LAYER

MISTRAL = Family(
    title="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    body="model.",
    gguf=None,  # llama.cpp's Llama stands for it, without the window
    constants=CONSTANTS,
    keys=(
        *llama_keys(
            vocab_size=32000,
            intermediate_size=14336,
            max_position_embeddings=131072,
            num_key_value_heads=8,
        ),
        EVERY_LAYER,
    ),
    concerns=(ACTIVATION, ROPE),
    fixed=LLAMA_FIXED,
    ignored=GENERAL_KEYS,
    places=LINEAR_PLACES | PRE_NORM_PLACES,
    buffers=ROTARY_BUFFERS,
    gguf_keys=GGUF_KEYS,
)
