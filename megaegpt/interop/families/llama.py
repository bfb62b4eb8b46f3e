"""Llama (Touvron et al., arXiv 2302.13971; 3: arXiv 2407.21783), and what has its form: SmolLM2."""

from __future__ import annotations

from megaegpt.interop.families.family import Family
from megaegpt.interop.families.rope_keys import ROPE
from megaegpt.interop.families.shared import (
    ACTIVATION,
    BIASES,
    CONSTANTS,
    GENERAL_KEYS,
    GGUF_KEYS,
    LINEAR_PLACES,
    LLAMA_FIXED,
    PRE_NORM_PLACES,
    ROTARY_BUFFERS,
    llama_keys,
)

LLAMA = Family(
    title="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    body="model.",
    gguf="llama",
    constants=CONSTANTS,
    keys=llama_keys(vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048),
    concerns=(ACTIVATION, ROPE, BIASES),
    fixed=LLAMA_FIXED,
    ignored=GENERAL_KEYS,
    places=LINEAR_PLACES | PRE_NORM_PLACES,
    buffers=ROTARY_BUFFERS,
    gguf_keys=GGUF_KEYS,
    gguf_pairs_rows=True,
)
