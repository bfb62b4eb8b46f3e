"""The model of a run as it is at step 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megaegpt.config import RunConfig
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.interop.sources import resolve_weights_source
from megaegpt.model.adapter_files import Base
from megaegpt.model.adapters import choose_trained, initialize_adapters
from megaegpt.model.build import Model, build_model
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.initialization import (
    initialize_from_encoder,
    initialize_sink,
    initialize_token_memory,
)
from megaegpt.model.weights import load_weights, read_weights_config, tensors_digest
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import raising_together
from megaegpt.training.consistency import check_ranks_agree, weights_facts
from megaegpt.training.identity import check_initialization

_KEY = "training.initialize_from"

MEMORY_SAMPLE = 8192
"""Tokens of the training text on whose states a token memory begins."""


def starting_model(
    config: RunConfig,
    grid: ProcessGrid,
    training_text: TokenStream | None,
    encoder: FrozenEncoder | None,
    compiles: bool,
    notices: list[str],
    new: bool,
) -> Model:
    """Return the model as it is at step 0: random, or from weights, or from its encoder's end. At
    ZeRO stage 3, where a device may not have room for all of it, it is in this machine's memory.
    Collective over all ranks.

    Args:
        training_text: on whose first tokens an EGPT's memory begins; None: there is no such text.
        compiles: its blocks, and the encoder's.
        notices: what should be known of these weights is added.
        new: no checkpoint will overwrite the weights.

    Raises:
        ConfigError: ``training.freeze`` or ``training.lora`` does not fit the model, or the
            training text has no chunk where one is needed.
        CheckpointError: weights that it starts from are missing, damaged or do not fit.
    """
    if encoder is not None and compiles:
        encoder.gpt.stack.compile_blocks()
    training = config.training
    model = build_model(
        config.model,
        grid,
        seed=training.seed,
        activation_checkpointing=training.activation_checkpointing,
        sequence_parallel=config.parallel.sequence_parallel,
        compile_blocks=compiles,
        on_host=config.parallel.zero_stage == 3,
    )
    if encoder is not None and config.model.encoder.initialize_decoder:
        source = resolve_weights_source(str(config.model.encoder.source), grid)
        with raising_together(grid):
            initialize_from_encoder(model, source, grid)
    random = new and training.initialize_from is None
    if encoder is not None and random and isinstance(model, EGPT):
        if model.token_memory is not None or model.sink is not None:
            first = _first_chunks(training_text, config.model.egpt.chunk_size)
        if model.token_memory is not None:
            source = resolve_weights_source(str(config.model.encoder.source), grid)
            initialize_token_memory(model, encoder, source, first)
        if model.sink is not None:
            initialize_sink(model, encoder, first)
    # A checkpoint has all weights but those that adapters lie beside.
    needed = new or training.lora.rank is not None
    if training.initialize_from is not None and needed:
        weights = resolve_weights_source(training.initialize_from, grid, key=_KEY)
        check_ranks_agree(lambda: weights_facts(_KEY, weights), grid)
        with raising_together(grid):
            _check_encoder(weights, encoder)
            notices += check_initialization(config.model, weights)
            load_weights(model, weights, grid)
    with raising_together(grid):
        choose_trained(model, training)
    initialize_adapters(model, training.seed, grid)
    return model


def base_of_adapters(config: RunConfig, grid: ProcessGrid) -> Base | None:
    """The weights beside which a run trains adapters; None: it trains none. Collective.

    Raises:
        CheckpointError: they cannot be had.
    """
    source = config.training.initialize_from
    if config.training.lora.rank is None or source is None:
        return None
    return Base(source, tensors_digest(resolve_weights_source(source, grid, key=_KEY)))


def _first_chunks(stream: TokenStream | None, size: int) -> torch.Tensor:
    """Tokens (n, S) of the training text's first chunks, on whose states a token memory begins."""
    if stream is None or len(stream) < size:
        found = 0 if stream is None else len(stream)
        raise ConfigError(
            f"data.train has {found:,} tokens: a token memory and an attention sink begin as the "
            f"encoder's states of its first chunk of {size:,}"
        )
    chunks = min(len(stream) // size, max(1, MEMORY_SAMPLE // size))
    return torch.from_numpy(stream.read(0, chunks * size).astype(np.int64)).view(-1, size)


def _check_encoder(weights: Path, encoder: FrozenEncoder | None) -> None:
    """A decoder goes on over the encoder it was trained with."""
    kept = read_weights_config(weights)[1]
    if encoder is None or kept.get("encoder_fingerprint") is None:
        return
    if (difference := encoder.difference(kept)) is not None:
        raise CheckpointError(
            f"{weights} was trained over another encoder than model.encoder.source: {difference}"
        )
