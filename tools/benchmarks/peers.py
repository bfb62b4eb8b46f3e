"""Other programs' models, from checkouts that the user names. None of their code is here."""

from __future__ import annotations

import importlib.util
import sys
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


def nanogpt(folder: Path, shape: dict[str, int]) -> nn.Module:
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


def hugging_face(shape: dict[str, int]) -> nn.Module:
    """transformers' GPT2LMHeadModel without dropout."""
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


def litgpt(folder: Path, shape: dict[str, int]) -> nn.Module:
    """Lightning-AI/litgpt's GPT; ``forward(tokens) -> logits``."""
    sys.path.insert(0, str(folder))
    try:
        from litgpt import GPT, Config
    except ImportError as error:
        raise ConfigError(f"litgpt in {folder} cannot be imported: {error}") from None
    return GPT(
        Config(
            block_size=shape["context"],
            padded_vocab_size=shape["vocab"],
            vocab_size=shape["vocab"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_embd=shape["hidden"],
            bias=True,
            norm_class_name="LayerNorm",
            mlp_class_name="GptNeoxMLP",
            parallel_residual=False,
        )
    )


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
