"""What starts as the encoder is: a decoder as the encoder's last blocks, final norm and head, a
token memory as a cache of its states.

Over an encoder cut by as many blocks as the decoder has (``model.encoder.layers``), a DeepGPT is
then the whole pretrained GPT at step 0, and so is an EGPT with local attention and no sink, a
residual adapter and a closed memory gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file
from megaegpt.model.attention.layer import layer_window
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import WEIGHTS, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import shard, spec_of
from megaegpt.parallel.together import broadcast_object, raising_together

_SAME_ROTARY = (
    "positions",
    "rope_base",
    "rope_fraction",
    "rope_pairs",
    "rope_scaling",
    "rope_head_dim",
    "rope_original_length",
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
_KEYS = {
    "kv_heads": "num_kv_heads",
    "head_size": "head_dim",
    "ffn_size": "ffn_hidden_size",
    "latent_size": "latent_dim",
    "has_qkv_bias": "qkv_bias",
    "rope_original_length": "rope_scaling.original_max_seq_len",
}
"""Keys of fields whose defaults are resolved."""


def initialization_problems(decoder: ModelConfig, encoder: ModelConfig) -> list[str]:
    """Why ``decoder`` cannot start as the end of ``encoder``; empty if it can."""
    rotary = "rotary" in (encoder.positions, decoder.positions)
    latent = "latent" in (encoder.attention, decoder.attention)
    differences = [
        f"its {_KEYS.get(name, name)} is {getattr(encoder, name)}, model's {getattr(decoder, name)}"
        for name in (*_SAME, *(_SAME_ROTARY if rotary else ()))
        if getattr(encoder, name) != getattr(decoder, name) and (latent or name != "latent_size")
    ]
    problems = []
    if differences:
        copied = "model.encoder.initialize_decoder copies its blocks"
        problems.append(f"{copied}, and {', '.join(differences)}")
    if rotary and decoder.kind == "egpt" and not decoder.egpt.local_attention:
        problems.append(
            "model.encoder.initialize_decoder copies rotary positions of tokens: without "
            "model.egpt.local_attention, model rotates by the number of a chunk"
        )
    problems += _window_problems(decoder, encoder)
    if decoder.num_layers > encoder.num_layers:
        problems.append(
            f"it has {encoder.num_layers} blocks, too few for the {decoder.num_layers} that "
            "model.encoder.initialize_decoder copies"
        )
    return problems


def _window_problems(decoder: ModelConfig, encoder: ModelConfig) -> Iterator[str]:
    """Blocks that would attend less or more far within a chunk than those that they are copies of,
    whose numbers are others.
    """
    size, skipped = decoder.egpt.chunk_size, encoder.num_layers - decoder.num_layers
    for layer in range(max(0, -skipped), decoder.num_layers):
        theirs, ours = (
            min(layer_window(config, number) or size, size)
            for config, number in ((encoder, layer + skipped), (decoder, layer))
        )
        if theirs != ours:
            yield (
                f"its block {layer + skipped} attends to {theirs} tokens of a chunk and model's "
                f"block {layer}, a copy by model.encoder.initialize_decoder, to {ours}: set "
                "model.window and model.window_every so that they are the same"
            )
            return


def initialize_from_encoder(model: nn.Module, folder: str | Path, grid: ProcessGrid) -> None:
    """Overwrite the blocks, final norm and head of an EGPT or DeepGPT with this rank's slices
    of the last ones in an encoder's weights folder. Gates and what precedes the blocks stay.

    Raises:
        CheckpointError: the weights are missing, damaged, or not of such an encoder.
    """
    encoder, _ = read_weights_config(folder)
    decoder: ModelConfig = model.config  # type: ignore[assignment]
    skipped = encoder.num_layers - decoder.num_layers
    with _weights_file(folder, "the decoder") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("stack.", "head.")) or name.endswith("attention.gate"):
                continue
            full = file.get_tensor(_source_name(name, skipped, encoder.tied_embeddings))
            parameter.copy_(shard(full, spec_of(parameter), grid))


def initialize_token_memory(
    model: EGPT, encoder: FrozenEncoder, folder: str | Path, tokens: Tensor
) -> None:
    """Let the keys and queries of a new token memory be the principal directions of its encoder's
    states, so that it is a continuous cache before it has learned anything: a random projection of
    a few numbers tells too little of two states. Collective over all ranks, which end with the same
    numbers.

    Each of several pointers has other ones of those directions: with the same they would learn the
    same, and stay equal.

    Over a cut encoder states first go through the whole one's final norm, which weighs their
    columns as its head does.

    Args:
        model: with a token memory.
        encoder: cut as the model's configuration says.
        folder: the encoder's weights.
        tokens: (n, S) of a few chunks, the same on every rank.

    Raises:
        CheckpointError: the weights are missing or damaged.
    """
    memory, grid = model.token_memory, model.grid
    assert memory is not None
    if model.config.encoder.layers is not None and model.config.norm == encoder.config.norm:
        opened = _weights_file(folder, "the token memory")
        with raising_together(grid), opened as file, torch.no_grad():
            for name, parameter in memory.norm.named_parameters():
                if name != "bias" or encoder.config.bias:  # else it stays 0
                    parameter.copy_(file.get_tensor(f"stack.norm.{name}"))
    with torch.no_grad():
        states = encoder(tokens.to(grid.device)).flatten(0, 1).float()  # (n * S, C)
        states = states.to(memory.key.device)  # the host's at ZeRO stage 3
        directions = F.normalize(memory.norm(states), dim=-1).double()
        covariance = directions.T.cov()  # (C, C)
        basis = torch.linalg.eigh(covariance).eigenvectors.flip(1).T  # (C, C), largest first
        largest = basis.abs().argmax(1, keepdim=True)
        basis = basis * basis.gather(1, largest).sign()  # the sign is arbitrary otherwise
        apart = memory.pointers
        wanted = torch.cat([basis[h::apart][: memory.dim] for h in range(apart)]).cpu()
        wanted = broadcast_object(lambda: wanted, grid)
        for parameter in (memory.query, memory.key):
            parameter.copy_(wanted)


def initialize_sink(model: EGPT, encoder: FrozenEncoder, tokens: Tensor) -> None:
    """Let the attention sink of a new model be the encoder's state of a text's first token, which
    is nearly the same whatever the token. Collective over all ranks.

    Args:
        model: with an attention sink.
        encoder: cut as the model's configuration says.
        tokens: (n, S) of a few chunks, the same on every rank.
    """
    assert model.sink is not None
    with torch.no_grad():
        firsts = encoder(tokens[:, :1].to(model.grid.device))[:, 0]  # (n, C)
        mean = firsts.float().mean(0).cpu()
        mean = broadcast_object(lambda: mean, model.grid)
        model.sink.copy_(mean)


@contextlib.contextmanager
def _weights_file(folder: str | Path, what: str) -> Iterator[Any]:
    """The opened tensors of a weights folder, to initialise ``what``.

    Raises:
        CheckpointError: they are missing or damaged, or lack what is read inside the block.
    """
    path = Path(folder) / WEIGHTS
    check_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot initialise {what}: {error}") from None


def _source_name(name: str, skipped: int, tied: bool) -> str:
    """The encoder's name of what a decoder calls ``name``."""
    if name.startswith("head."):
        return "embedding.weight" if tied else name
    if name.startswith("stack.blocks."):
        _, _, number, rest = name.split(".", 3)
        return f"stack.blocks.{int(number) + skipped}.{rest}"
    return name
