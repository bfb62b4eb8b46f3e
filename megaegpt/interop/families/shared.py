"""Keys and places that the families of Llama's descent share in Hugging Face's form."""

from __future__ import annotations

from typing import Any

from megaegpt.config import ModelConfig
from megaegpt.interop.description import Description, shown
from megaegpt.interop.families.family import Concern, Key, Place

GENERAL_KEYS = frozenset(
    # what describes or stores it
    ["architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "prefix"]
    + ["tokenizer_class", "attn_implementation", "torchscript", "use_bfloat16", "tf_legacy_loss"]
    + ["transformers.js_config", "is_llama_config", "unsloth_fixed", "unsloth_version"]
    # tokens of its tokenizer
    + [f"{kind}_token_id" for kind in ("bos", "eos", "pad", "sep", "cls", "unk", "mask")]
    + [f"{kind}_token_id" for kind in ("decoder_start", "forced_bos", "forced_eos")]
    # how it is trained, classifies, or is cut over devices
    + ["attention_dropout", "pretraining_tp", "problem_type", "id2label", "label2id"]
    + ["num_labels", "finetuning_task", "task_specific_params"]
    # how it is called
    + ["use_cache", "output_hidden_states", "output_attentions", "output_scores", "return_dict"]
    + ["return_dict_in_generate", "chunk_size_feed_forward", "is_decoder"]
    + ["tie_encoder_decoder", "cross_attention_hidden_size"]
    # how it is generated from
    + ["max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"]
    + ["num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "min_p"]
    + ["typical_p", "diversity_penalty", "repetition_penalty", "length_penalty"]
    + ["no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"]
    + ["exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"]
    + ["remove_invalid_values"]
)
"""Keys of any configuration that do not change what a trained model computes."""

FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "auto_map": (None,),  # code beside the weights
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
}
"""Keys of any configuration that change what is computed, with the values that we compute."""

LLAMA_FIXED = FIXED | {"rope_interleaved": (False,)}
CONSTANTS: dict[str, Any] = {"positions": "rotary", "norm": "rms_norm", "bias": False}


def llama_keys(
    *,
    vocab_size: int,
    intermediate_size: int,
    max_position_embeddings: int,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    rms_norm_eps: float = 1e-6,
) -> tuple[Key, ...]:
    """The keys of sizes, with a family's defaults."""
    return (
        Key("vocab_size", "vocab_size", vocab_size),
        Key("max_position_embeddings", "max_seq_len", max_position_embeddings),
        Key("hidden_size", "hidden_size", 4096),
        Key("num_hidden_layers", "num_layers", 32),
        Key("num_attention_heads", "num_heads", 32),
        Key("num_key_value_heads", "num_kv_heads", num_key_value_heads, nullable=True),
        Key("head_dim", "head_dim", head_dim),
        Key("intermediate_size", "ffn_hidden_size", intermediate_size),
        Key("rms_norm_eps", "layer_norm_eps", rms_norm_eps, float),
        Key("initializer_range", "init_std", 0.02, float),
        Key("tie_word_embeddings", "tied_embeddings", False, bool),
    )


# -- the gated MLP's activation -------------------------------------------------------------------

_ACTIVATIONS = {
    "silu": {"mlp": "swiglu"},
    "swish": {"mlp": "swiglu"},
    "gelu_pytorch_tanh": {"mlp": "geglu", "activation": "gelu_tanh"},
    "gelu_new": {"mlp": "geglu", "activation": "gelu_tanh"},
    "gelu": {"mlp": "geglu", "activation": "gelu"},
}


def _read_activation(theirs: Description) -> dict[str, Any]:
    name = theirs.read("hidden_act", str, "silu")
    if name not in _ACTIVATIONS:
        raise theirs.error(f"hidden_act={shown(name)} is none of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _write_activation(config: ModelConfig) -> dict[str, Any]:
    if config.mlp != "geglu":
        return {"hidden_act": "silu"}
    return {"hidden_act": "gelu" if config.activation == "gelu" else "gelu_pytorch_tanh"}


ACTIVATION = Concern(("hidden_act",), _read_activation, _write_activation)


# -- biases of all linear layers, or of none ------------------------------------------------------


def _read_biases(theirs: Description) -> dict[str, Any]:
    attention, mlp = (theirs.read(key, bool, False) for key in ("attention_bias", "mlp_bias"))
    if attention != mlp:
        raise theirs.error(
            f"attention_bias={attention} with mlp_bias={mlp} cannot be expressed: all linear "
            "layers have biases here, or none, or queries, keys and values alone"
        )
    return {"bias": attention}


BIASES = Concern(
    ("attention_bias", "mlp_bias"),
    _read_biases,
    lambda config: {"attention_bias": config.bias, "mlp_bias": config.bias},
)


# -- tensors --------------------------------------------------------------------------------------

_BLOCK, _THEIRS, _GGUF = "stack.blocks.{n}", "layers.{n}", "blk.{n}"

LINEAR_PLACES = {
    "embedding": Place("embed_tokens", "token_embd"),
    f"{_BLOCK}.attention.query": Place(f"{_THEIRS}.self_attn.q_proj", f"{_GGUF}.attn_q"),
    f"{_BLOCK}.attention.key": Place(f"{_THEIRS}.self_attn.k_proj", f"{_GGUF}.attn_k"),
    f"{_BLOCK}.attention.value": Place(f"{_THEIRS}.self_attn.v_proj", f"{_GGUF}.attn_v"),
    f"{_BLOCK}.attention.output": Place(f"{_THEIRS}.self_attn.o_proj", f"{_GGUF}.attn_output"),
    f"{_BLOCK}.mlp.gate": Place(f"{_THEIRS}.mlp.gate_proj", f"{_GGUF}.ffn_gate"),
    f"{_BLOCK}.mlp.up": Place(f"{_THEIRS}.mlp.up_proj", f"{_GGUF}.ffn_up"),
    f"{_BLOCK}.mlp.down": Place(f"{_THEIRS}.mlp.down_proj", f"{_GGUF}.ffn_down"),
    "stack.norm": Place("norm", "output_norm"),
    "head": Place("lm_head", "output", in_body=False),
}
PRE_NORM_PLACES = {
    f"{_BLOCK}.attention_norm": Place(f"{_THEIRS}.input_layernorm", f"{_GGUF}.attn_norm"),
    f"{_BLOCK}.mlp_norm": Place(f"{_THEIRS}.post_attention_layernorm", f"{_GGUF}.ffn_norm"),
}
POST_NORM_PLACES = {
    f"{_BLOCK}.attention_norm": Place(
        f"{_THEIRS}.post_attention_layernorm", f"{_GGUF}.post_attention_norm"
    ),
    f"{_BLOCK}.mlp_norm": Place(f"{_THEIRS}.post_feedforward_layernorm", f"{_GGUF}.post_ffw_norm"),
}
QK_NORM_PLACES = {
    f"{_BLOCK}.attention.query_norm": Place(f"{_THEIRS}.self_attn.q_norm", f"{_GGUF}.attn_q_norm"),
    f"{_BLOCK}.attention.key_norm": Place(f"{_THEIRS}.self_attn.k_norm", f"{_GGUF}.attn_k_norm"),
}
ROTARY_BUFFERS = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Buffers that versions of transformers before 4.32 saved besides the weights."""

GGUF_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
}
