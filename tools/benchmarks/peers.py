"""Other programs' models, from checkouts that the user names. None of their code is here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megaegpt.errors import ConfigError


def load_module(folder: Path, file: str) -> ModuleType:
    """Import ``folder/file`` as a module of its own; its folder becomes importable.

    Raises:
        ConfigError: it is not there or does not import.
    """
    path = folder / file
    name = f"peer_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path} does not exist: give a checkout of the peer")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError(f"{path} cannot be imported: {error}") from None
    return module


def nanogpt(folder: Path, shape: dict[str, Any]) -> nn.Module:
    """karpathy/nanoGPT's GPT; ``forward(tokens, targets) -> (logits, mean loss)``."""
    module = load_module(folder, "model.py")
    return module.GPT(
        module.GPTConfig(
            block_size=shape["context"],
            vocab_size=shape["vocab"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_embd=shape["hidden"],
            dropout=0.0,
            bias=True,
        )
    )


def hugging_face(shape: dict[str, Any]) -> nn.Module:
    """transformers' GPT2LMHeadModel without dropout, or its LlamaForCausalLM."""
    if shape.get("family") == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocab"],
                max_position_embeddings=shape["context"],
                hidden_size=shape["hidden"],
                intermediate_size=shape["ffn"],
                num_hidden_layers=shape["layers"],
                num_attention_heads=shape["heads"],
                num_key_value_heads=shape["kv_heads"],
                tie_word_embeddings=True,
            )
        )
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape["vocab"],
            n_positions=shape["context"],
            n_embd=shape["hidden"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


_LITGPT = {
    "gpt2": {"bias": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP"},
    "llama": {"bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP"},
}


def litgpt(folder: Path, shape: dict[str, Any], lora: int | None = None) -> nn.Module:
    """Lightning-AI/litgpt's GPT; ``forward(tokens) -> logits``.

    Args:
        lora: rank of its adapters of all linear layers of the blocks, which alone are trained then.
    """
    sys.path.insert(0, str(folder))
    try:
        if lora is None:
            from litgpt import GPT, Config
        else:
            from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    except ImportError as error:
        raise ConfigError(f"litgpt in {folder} cannot be imported: {error}") from None
    options: dict[str, Any] = dict(_LITGPT[shape.get("family", "gpt2")])
    if shape.get("family") == "llama":
        options |= {"n_query_groups": shape["kv_heads"], "intermediate_size": shape["ffn"]}
        options |= {"rotary_percentage": 1.0}
    if lora is not None:
        targets = ("query", "key", "value", "projection", "mlp")
        options |= {"lora_r": lora, "lora_alpha": 16} | {f"lora_{t}": True for t in targets}
    model = GPT(
        Config(
            block_size=shape["context"],
            padded_vocab_size=shape["vocab"],
            vocab_size=shape["vocab"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_embd=shape["hidden"],
            parallel_residual=False,
            **options,
        )
    )
    head = model.lm_head if lora is None else model.lm_head.linear
    head.weight = model.transformer.wte.weight  # as ours and the others'
    if lora is not None:
        mark_only_lora_as_trainable(model)
    return model


def build(name: str, folder: Path | None, shape: dict[str, Any]) -> nn.Module:
    """A peer's model by its name.

    Raises:
        ConfigError: the folder is missing, or cannot be imported, or there is no such family.
    """
    if name == "nanogpt" and shape.get("family") == "llama":
        raise ConfigError("nanoGPT has GPT-2's blocks only: leave --peer nanogpt out")
    if name == "hf":
        return hugging_face(shape)
    return (nanogpt if name == "nanogpt" else litgpt)(folder or Path(), shape)


def mean_loss(name: str, model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Each peer's own way to a loss."""
    if name == "nanogpt":
        return model(tokens, targets)[1]
    if name == "hf":
        return torch.nn.functional.cross_entropy(
            model(tokens).logits.flatten(0, 1), targets.flatten()
        )
    logits = model(tokens)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


# -- greedy continuation: (model, prompts (B, T), new tokens) -> what does it once ---------------


def _nanogpt_continuation(model: Any, prompts: Tensor, tokens: int) -> Callable[[], Any]:
    return lambda: model.generate(prompts, tokens, top_k=1)


def _hugging_face_continuation(model: Any, prompts: Tensor, tokens: int) -> Callable[[], Any]:
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 50256}
    seen = torch.ones_like(prompts)
    return lambda: model.generate(prompts, attention_mask=seen, do_sample=False, **options)


def _litgpt_continuation(model: Any, prompts: Tensor, tokens: int) -> Callable[[], Any]:
    """The two functions behind its ``LLM.generate``; the cache is as long as the text."""
    from litgpt.generate.base import batched_generate_fn, generate_fn

    model.max_seq_length = length = prompts.shape[1] + tokens
    dtype = next(model.parameters()).dtype
    model.set_kv_cache(len(prompts), device=prompts.device, dtype=dtype)
    options = {"include_prompt": False, "include_eos": False}
    if len(prompts) == 1:
        return lambda: list(generate_fn(model, prompts[0], length, temperature=0.0, **options))
    greedy = {"temperature": 0.0}
    return lambda: list(batched_generate_fn(model, prompts, length, sample_args=greedy, **options))


CONTINUATIONS: dict[str, Callable[[Any, Tensor, int], Callable[[], Any]]] = {
    "nanogpt": _nanogpt_continuation,
    "hf": _hugging_face_continuation,
    "litgpt": _litgpt_continuation,
}
