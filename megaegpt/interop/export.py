"""Models of ours for other programs: Hugging Face's form where it can be, else safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from megaegpt.config import ModelConfig
from megaegpt.data.tokenizer import END_OF_TEXT_ID, Tokenizer
from megaegpt.errors import CheckpointError
from megaegpt.files import whole_folder
from megaegpt.interop.gpt2_layout import to_theirs
from megaegpt.interop.gpt2_vocabulary import write_tokenizer
from megaegpt.interop.tensor_files import check_finite
from megaegpt.model.build import empty_model
from megaegpt.model.weights import WEIGHTS, load_weights, read_weights_config, verify_weights
from megaegpt.parallel.grid import ProcessGrid

_CONFIG = "config.json"


def export_weights(weights: str | Path, output: str | Path) -> list[str]:
    """Write a model of ours, of any kind, as a folder for other programs.

    A GPT-2-shaped one goes into Hugging Face's form (see :func:`export_gpt2`), any other keeps the
    form it has: full tensors in safetensors, and a ``config.json``.

    Returns:
        Why it could not be Hugging Face's form; empty if it is.

    Raises:
        CheckpointError: the weights are missing, damaged or not finite, or ``output`` cannot be
            written.
    """
    weights = Path(weights)
    config, _ = read_weights_config(weights)
    verify_weights(weights)
    differences = not_gpt2_shaped(config)
    if not differences:
        export_gpt2(weights, output)
        return []
    check_finite(load_file(weights / WEIGHTS), weights)
    with whole_folder(Path(output)) as folder:
        for name in (WEIGHTS, _CONFIG):
            shutil.copyfile(weights / name, folder / name)
    return differences


def export_gpt2(weights: str | Path, output: str | Path) -> None:
    """Write a GPT-2-shaped model of ours as a folder that ``AutoModelForCausalLM.from_pretrained``
    and ``AutoTokenizer.from_pretrained`` load, in fp32.

    Raises:
        CheckpointError: the model is not GPT-2-shaped, the weights are damaged or not finite, or
            ``output`` cannot be written.
    """
    weights, output = Path(weights), Path(output)
    config, _ = read_weights_config(weights)
    if differences := not_gpt2_shaped(config):
        raise CheckpointError(f"{weights} is not GPT-2-shaped: {', '.join(differences)}")
    grid = ProcessGrid()
    model = empty_model(config, grid)
    load_weights(model, weights, grid)
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    check_finite(ours, weights)
    tensors = {
        _their_full_name(name): t.contiguous() for name, t in to_theirs(ours, config).items()
    }
    with whole_folder(output) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_their_config(config), indent=2)
        (folder / _CONFIG).write_text(f"{text}\n", encoding="utf-8")
        if config.vocab_size > END_OF_TEXT_ID:
            write_tokenizer(folder, Tokenizer.load(), config.max_seq_len)


def not_gpt2_shaped(config: ModelConfig) -> list[str]:
    """What keeps Hugging Face's GPT-2 from computing this model; nothing: it can."""
    needed: dict[str, Any] = {
        "kind": "gpt",
        "attention": "grouped_query",
        "positions": "learned",
        "window": None,
        "kv_heads": config.num_heads,
        "head_size": config.hidden_size / config.num_heads,
    }
    return [
        f"{key}={getattr(config, key)}" for key, v in needed.items() if getattr(config, key) != v
    ]


def _their_full_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"transformer.{name}"


def _their_config(config: ModelConfig) -> dict[str, Any]:
    end = END_OF_TEXT_ID if config.vocab_size > END_OF_TEXT_ID else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_size,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        "tie_word_embeddings": config.tied_embeddings,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": config.init_std,
        **{f"{part}_pdrop": config.dropout for part in ("resid", "embd", "attn")},
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": "float32",
    }
