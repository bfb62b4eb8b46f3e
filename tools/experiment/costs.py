"""What reading a token costs, by count: operations of a forward pass, and bytes kept of it.

Bytes are of numbers of two bytes, as on a GPU, and ids of four.
"""

from __future__ import annotations

from megaegpt.config import ModelConfig
from megaegpt.model.build import meta_model
from megaegpt.model.encoder import encoding_flops
from tools.experiment.plan import ReadingPlan

Cost = dict[str, float]
_NUMBER, _ID = 2, 4


def reading_cost(gpt: ModelConfig, reading: ReadingPlan, window: ModelConfig) -> Cost:
    """Of the encoder alone: ``forward_flops`` and ``cache_bytes``, both by token of a window.

    Args:
        window: of a decoder: how long windows are.
    """
    length = reading.context or window.egpt.chunk_size
    head = 2 * gpt.vocab_size * gpt.hidden_size
    held = min(length + reading.overlap, window.sample_len)
    return {
        "forward_flops": encoding_flops(gpt, length, reading.overlap) + head,
        "cache_bytes": _kept(gpt) * held / window.sample_len,
    }


def variant_cost(gpt: ModelConfig, model: ModelConfig) -> Cost:
    """Of an EGPT or DeepGPT over a (cut) encoder: the same."""
    egpt, overlap = model.egpt, model.encoder.overlap
    own = meta_model(model).flops_per_token() / 3
    current = _kept(gpt) * (egpt.chunk_size + overlap)
    if model.kind == "deepgpt" or egpt.local_attention:
        current += _kept(model) * egpt.chunk_size
    kept = current / model.sample_len
    if model.has_history:
        kept += _NUMBER * model.hidden_size / egpt.chunk_size
        if egpt.token_memory:
            kept += _NUMBER * egpt.memory_dim * egpt.memory_pointers + _ID
    return {
        "forward_flops": own + encoding_flops(gpt, egpt.chunk_size, overlap),
        "cache_bytes": kept,
    }


def _kept(gpt: ModelConfig) -> int:
    """Bytes of a token in a cache of keys and values."""
    if gpt.attention == "latent":
        return _NUMBER * gpt.num_layers * ((gpt.latent_size or 0) + (gpt.rope_head_dim or 0))
    return _NUMBER * gpt.num_layers * 2 * gpt.kv_heads * gpt.head_size
