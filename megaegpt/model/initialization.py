"""A decoder that starts as the end of its encoder: the encoder's last blocks, final norm and
head.

Over an encoder cut by as many blocks as the decoder has (``model.encoder.layers``), a DeepGPT is
then the whole pretrained GPT at step 0, and so is an EGPT with local attention, a residual adapter
and a closed memory gate.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from megaegpt.config import ModelConfig
from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file
from megaegpt.model.weights import WEIGHTS, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import shard, spec_of

_SAME_ROTARY = (
    "positions",
    "rope_base",
    "rope_fraction",
    "rope_pairs",
    "rope_scaling",
    "rope_head_dim",
)
_SAME = (
    "attention",
    "num_heads",
    "kv_heads",
    "head_size",
    "ffn_size",
    "latent_size",
    "query_latent_dim",
    "latent_norm",
    "mlp",
    "activation",
    "bias",
    "has_qkv_bias",
    "qk_norm",
    "norm",
    "norm_placement",
    "logit_softcap",
    "layer_norm_eps",
)
"""Fields that decide the shapes and the meaning of a block's weights."""


def initialization_problems(decoder: ModelConfig, encoder: ModelConfig) -> list[str]:
    """Why ``decoder`` cannot start as the end of ``encoder``; empty if it can."""
    rotary = "rotary" in (encoder.positions, decoder.positions)
    problems = [
        f"its {name} is {getattr(encoder, name)}, model's {getattr(decoder, name)}, and "
        "model.encoder.initialize_decoder copies blocks"
        for name in (*_SAME, *(_SAME_ROTARY if rotary else ()))
        if getattr(encoder, name) != getattr(decoder, name)
    ]
    if rotary and decoder.kind == "egpt" and not decoder.egpt.local_attention:
        problems.append(
            "model.encoder.initialize_decoder copies rotary positions of tokens: without "
            "model.egpt.local_attention, model rotates by the number of a chunk"
        )
    if decoder.num_layers > encoder.num_layers:
        problems.append(
            f"it has {encoder.num_layers} blocks, too few for the {decoder.num_layers} that "
            "model.encoder.initialize_decoder copies"
        )
    return problems


def initialize_from_encoder(model: nn.Module, folder: str | Path, grid: ProcessGrid) -> None:
    """Overwrite the blocks, final norm and head of an EGPT or DeepGPT with this rank's slices
    of the last ones in an encoder's weights folder. Gates and what precedes the blocks stay.

    Raises:
        CheckpointError: the weights are missing, damaged, or not of such an encoder.
    """
    encoder, _ = read_weights_config(folder)
    decoder: ModelConfig = model.config  # type: ignore[assignment]
    skipped = encoder.num_layers - decoder.num_layers
    path = Path(folder) / WEIGHTS
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith(("stack.", "head.")) or name.endswith("attention.gate"):
                    continue
                full = file.get_tensor(_source_name(name, skipped, encoder.tied_embeddings))
                parameter.copy_(shard(full, spec_of(parameter), grid))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot initialise the decoder: {error}") from None


def _source_name(name: str, skipped: int, tied: bool) -> str:
    """The encoder's name of what a decoder calls ``name``."""
    if name.startswith("head."):
        return "embedding.weight" if tied else name
    if name.startswith("stack.blocks."):
        _, _, number, rest = name.split(".", 3)
        return f"stack.blocks.{int(number) + skipped}.{rest}"
    return name
