"""GPT-2 models of Hugging Face's own, with random weights, and the same logits by both programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megaegpt.model.build import empty_model
from megaegpt.model.weights import load_weights, read_weights_config
from megaegpt.parallel.grid import ProcessGrid

VOCAB, LENGTH = 300, 16
SIZES: dict[str, Any] = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}


def random_gpt2(**changes: Any) -> GPT2LMHeadModel:
    """Every tensor is drawn, biases and norms too, widely enough that each of them matters."""
    model = GPT2LMHeadModel(GPT2Config(**{"vocab_size": VOCAB, **SIZES, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def tokens() -> Tensor:
    """(3, LENGTH) ids."""
    return torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def their_logits(model: GPT2LMHeadModel) -> Tensor:
    """(3, LENGTH, V)"""
    return model(tokens()).logits


@torch.no_grad()
def our_logits(folder: Path) -> Tensor:
    """(3, LENGTH, V), without the columns of padding."""
    grid = ProcessGrid()
    config, _ = read_weights_config(folder)
    model = empty_model(config, grid).eval()
    load_weights(model, folder, grid)
    return model.logits(tokens())[..., : config.vocab_size]
