"""GPT-2 (Radford et al., 2019).

Its linear layers are ``Conv1D``: weights are (in, out), ours transposed. Query, key and value are
one layer, ``c_attn``, side by side in the output dimension.
"""

from __future__ import annotations

from typing import Any

from megaegpt.config import ModelConfig
from megaegpt.interop.description import Description, shown
from megaegpt.interop.families.family import Concern, Family, Key, Place
from megaegpt.interop.families.shared import FIXED, GENERAL_KEYS

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _read_activation(theirs: Description) -> dict[str, Any]:
    name = theirs.read("activation_function", str, "gelu_new")
    if name not in _ACTIVATIONS:
        raise theirs.error(
            f"activation_function={shown(name)} is none of {', '.join(_ACTIVATIONS)}"
        )
    return {"activation": _ACTIVATIONS[name]}


def _write_activation(config: ModelConfig) -> dict[str, Any]:
    return {"activation_function": "gelu" if config.activation == "gelu" else "gelu_new"}


def _write_dropout(config: ModelConfig) -> dict[str, Any]:
    return {f"{part}_pdrop": config.dropout for part in ("resid", "embd", "attn")}


_DROPOUT = Concern(("resid_pdrop", "embd_pdrop", "attn_pdrop"), lambda theirs: {}, _write_dropout)
"""It is written for who trains on; what is read computes without it."""
_BLOCK, _THEIRS, _GGUF = "stack.blocks.{n}", "h.{n}", "blk.{n}"
_QKV = f"{_THEIRS}.attn.c_attn", f"{_GGUF}.attn_qkv"

GPT2 = Family(
    title="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    body="transformer.",
    gguf="gpt2",
    constants={},
    keys=(
        Key("vocab_size", "vocab_size", 50257),
        Key("n_positions", "max_seq_len", 1024, other="max_position_embeddings"),
        Key("n_embd", "hidden_size", 768, other="hidden_size"),
        Key("n_layer", "num_layers", 12, other="num_hidden_layers"),
        Key("n_head", "num_heads", 12, other="num_attention_heads"),
        Key("n_inner", "ffn_hidden_size", None),
        Key("layer_norm_epsilon", "layer_norm_eps", 1e-5, float),
        Key("initializer_range", "init_std", 0.02, float),
        Key("tie_word_embeddings", "tied_embeddings", True, bool),
    ),
    concerns=(Concern(("activation_function",), _read_activation, _write_activation), _DROPOUT),
    fixed=FIXED | {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    ignored=GENERAL_KEYS
    | {"n_ctx", "reorder_and_upcast_attn", "gradient_checkpointing"}
    | {f"summary_{part}" for part in ("type", "activation", "first_dropout", "hidden_size")}
    | {f"summary_{part}" for part in ("use_proj", "proj_to_labels")},
    places={
        "embedding": Place("wte", "token_embd"),
        "positions.table": Place("wpe", "position_embd"),
        f"{_BLOCK}.attention_norm": Place(f"{_THEIRS}.ln_1", f"{_GGUF}.attn_norm"),
        f"{_BLOCK}.attention.query": Place(*_QKV, transposed=True, part=0),
        f"{_BLOCK}.attention.key": Place(*_QKV, transposed=True, part=1),
        f"{_BLOCK}.attention.value": Place(*_QKV, transposed=True, part=2),
        f"{_BLOCK}.attention.output": Place(
            f"{_THEIRS}.attn.c_proj", f"{_GGUF}.attn_output", transposed=True
        ),
        f"{_BLOCK}.mlp_norm": Place(f"{_THEIRS}.ln_2", f"{_GGUF}.ffn_norm"),
        f"{_BLOCK}.mlp.up": Place(f"{_THEIRS}.mlp.c_fc", f"{_GGUF}.ffn_up", transposed=True),
        f"{_BLOCK}.mlp.down": Place(f"{_THEIRS}.mlp.c_proj", f"{_GGUF}.ffn_down", transposed=True),
        "stack.norm": Place("ln_f", "output_norm"),
        "head": Place("lm_head", "output", in_body=False),
    },
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask, and what it puts for scores
    zero_biases=True,
    gguf_keys={
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "feed_forward_length": "n_inner",
    },
)
