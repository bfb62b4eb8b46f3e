"""OLMo 2 (arXiv 2501.00656): Llama with norms after its layers, and of all queries and keys."""

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
    POST_NORM_PLACES,
    QK_NORM_PLACES,
    llama_keys,
)

OLMO2 = Family(
    title="OLMo 2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    body="model.",
    gguf="olmo2",
    constants=CONSTANTS | {"qk_norm": "projection", "norm_placement": "post"},
    keys=llama_keys(
        vocab_size=50304,
        intermediate_size=11008,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
    ),
    concerns=(ACTIVATION, ROPE),
    fixed=LLAMA_FIXED | {"attention_bias": (False,)},
    ignored=GENERAL_KEYS,
    places=LINEAR_PLACES | POST_NORM_PLACES | QK_NORM_PLACES,
    gguf_keys=GGUF_KEYS,
)
