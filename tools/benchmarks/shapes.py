"""The model that a benchmark's sizes and family stand for, the same for us and for the peers."""

from __future__ import annotations

import argparse
from typing import Any

from megaegpt.arguments import integer
from megaegpt.config import ModelConfig
from megaegpt.errors import ConfigError


def add_family(parser: argparse.ArgumentParser) -> None:
    """``--family`` and what only Llama's has."""
    parser.add_argument(
        "--family",
        choices=("gpt2", "llama"),
        default="gpt2",
        help="GPT-2's blocks, or Llama's with a tied head (%(default)s)",
    )
    parser.add_argument(
        "--kv-heads", type=integer(1), metavar="N", help="Llama only (as many as heads)"
    )


def with_family(shape: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The sizes with what the family adds to them."""
    if arguments.family == "gpt2":
        if arguments.kv_heads is not None:
            raise ConfigError("--kv-heads is for --family llama: leave it out")
        return shape
    shape = shape | {"family": "llama", "kv_heads": arguments.kv_heads or shape["heads"]}
    return shape | {"ffn": model_config(shape | {"ffn": None}).ffn_size}


def model_config(shape: dict[str, Any]) -> ModelConfig:
    """A model of these sizes; ``context`` where it is not a thousand."""
    sizes = {
        "max_seq_len": shape.get("context", 1024),
        "hidden_size": shape["hidden"],
        "num_layers": shape["layers"],
        "num_heads": shape["heads"],
    }
    if shape.get("family") != "llama":
        return ModelConfig(**sizes)
    return ModelConfig(
        **sizes,
        num_kv_heads=shape["kv_heads"],
        ffn_hidden_size=shape["ffn"],
        positions="rotary",
        norm="rms_norm",
        mlp="swiglu",
        bias=False,
    )
