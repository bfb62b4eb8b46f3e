"""What ranks do in these tests; apart, so that they need not import transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from megaegpt.config import EncoderConfig
from megaegpt.interop.sources import resolve_weights_source
from megaegpt.model.build import empty_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import load_weights, read_weights_config
from megaegpt.parallel.collectives import gather_from_tp
from tests.distributed.harness import grid_for


@torch.no_grad()
def logits_and_states(source: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``source`` as a GPT to train on, and as a frozen encoder, over two tensor-parallel ranks:
    (B, T, V) with the columns of padding, and (B, T, C).
    """
    grid = grid_for(2)
    folder = resolve_weights_source(source, grid)
    gpt = empty_model(read_weights_config(folder)[0], grid).eval()
    load_weights(gpt, folder, grid)
    encoder = FrozenEncoder.from_source(EncoderConfig(source=str(folder)), grid)
    return gather_from_tp(gpt.logits(tokens), grid, -1), encoder(tokens)
