"""What ranks do in these tests; apart, so that they need not import transformers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaegpt.config import EncoderConfig, RunConfig
from megaegpt.interop.sources import resolve_weights_source
from megaegpt.model.build import empty_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.weights import load_weights, read_weights_config
from megaegpt.parallel.collectives import gather_from_tp
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import grid_for


@contextlib.contextmanager
def _cache_at(folder: str) -> Iterator[None]:
    """These processes are older than a test's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAEGPT_CACHE", folder)
        yield


@torch.no_grad()
def logits_and_states(source: str, tokens: Tensor, cache: str) -> tuple[Tensor, Tensor]:
    """Of ``source`` as a GPT to train on, and as a frozen encoder, which all ranks are
    tensor-parallel for: (B, T, V) with the columns of padding, and (B, T, C).
    """
    grid = grid_for(dist.get_world_size())
    with _cache_at(cache):
        folder = resolve_weights_source(source, grid)
    gpt = empty_model(read_weights_config(folder)[0], grid).eval()
    load_weights(gpt, folder, grid)
    encoder = FrozenEncoder.from_source(EncoderConfig(source=str(folder)), grid)
    return gather_from_tp(gpt.logits(tokens), grid), encoder(tokens)


@torch.no_grad()
def loss_over_ranks(weights: Path, tokens: Tensor) -> float:
    """Of a GPT that all ranks are tensor-parallel for, summed over (1, T) ``tokens``."""
    grid = grid_for(dist.get_world_size())
    gpt = empty_model(read_weights_config(weights)[0], grid).eval()
    load_weights(gpt, weights, grid)
    return float(gpt(tokens[:, :-1], tokens[:, 1:]))


def run_over_ranks(config: RunConfig, cache: str) -> None:
    """Train from the first step to the last."""
    with _cache_at(cache), contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, grid_for(config.parallel.tensor_parallel_size))
