"""Nats of every token of a text by the frozen encoder alone: with an overlap, or densely over more
than a chunk.

Shapes: W windows, N chunks, S chunk size, L tokens read at once, O overlap.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megaegpt.bars import progress_bar
from megaegpt.config import ModelConfig
from megaegpt.data.tokens.windows import EvaluationWindows, tokens_before
from megaegpt.errors import ConfigError
from megaegpt.labels import IGNORE
from megaegpt.model.build import empty_model
from megaegpt.model.gpt import GPT
from megaegpt.model.weights import load_weights, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from tools.experiment.measure import Text
from tools.experiment.plan import ReadingPlan


def reader_config(encoder: ModelConfig, reading: ReadingPlan, chunk_size: int) -> ModelConfig:
    """The encoder's configuration with the reading's rotary scaling.

    Raises:
        ConfigError: the reading is longer than the encoder's context.
    """
    config = encoder
    if (scaling := reading.rope_scaling).kind != "none":
        longer = int(config.max_seq_len * scaling.factor)
        config = dataclasses.replace(config, rope_scaling=scaling, max_seq_len=longer)
    at_once = reading.context or chunk_size
    if at_once + reading.overlap > config.max_seq_len:
        raise ConfigError(
            f"the encoder sees {config.max_seq_len} tokens, a reading of {at_once} at once and "
            f"{reading.overlap} before them needs {at_once + reading.overlap}"
        )
    return config


def load_reader(
    weights: str, reading: ReadingPlan, chunk_size: int, grid: ProcessGrid, dtype: torch.dtype
) -> GPT:
    """The encoder as a GPT, in eval mode, with the reading's rotary scaling.

    Raises:
        ConfigError: see :func:`reader_config`.
    """
    config = reader_config(read_weights_config(weights)[0], reading, chunk_size)
    model = empty_model(config, grid).to(device=grid.device, dtype=dtype)
    load_weights(model, weights, grid)
    assert isinstance(model, GPT)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def reading_nats(gpt: GPT, text: Text, reading: ReadingPlan) -> np.ndarray:
    """Nats of each target, (W, N, S) float64; 0 where there is none."""
    length, overlap = reading.context or text.chunk_size, reading.overlap
    windows = EvaluationWindows(text.source, length)
    nats = np.zeros(text.targets.size)
    for number in progress_bar(range(len(windows)), "the encoder alone", unit="window"):
        batch = windows.batch(np.array([number]))
        before = tokens_before(text.source, number * length, overlap)
        if number * length < overlap:  # nothing, or not enough, is before it
            before = before[:0]
        tokens = np.concatenate([before, batch["tokens"][0]])
        targets = np.concatenate([np.full(len(before), IGNORE), batch["targets"][0]])
        found = gpt(
            *(torch.from_numpy(x)[None].to(gpt.grid.device) for x in (tokens, targets)),
            reduction="none",
        )
        own = found[0, len(before) :].double().cpu().numpy()
        part = slice(number * length, min((number + 1) * length, nats.size))
        nats[part] = own[: part.stop - part.start]
    return nats.reshape(text.targets.shape)
