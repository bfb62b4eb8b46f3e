"""From a configuration to an initialised model."""

from __future__ import annotations

from typing import Literal

import torch

from megaegpt.config import ModelConfig
from megaegpt.data.features.store import FeatureStore
from megaegpt.model.calling import ChunkInputs, Encode, ModelInputs, SequenceInputs
from megaegpt.model.decoding import (
    Decoder,
    DecodingSteps,
    DeepGPTDecoder,
    GPTDecoder,
)
from megaegpt.model.deepgpt import DeepGPT
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.model.egpt.egpt_decoder import EGPTDecoder
from megaegpt.model.egpt.egpt_inputs import EGPTInputs
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING, MemoryLimits
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.gpt import GPT
from megaegpt.parallel.chunks import ChunkShares
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import initialize

Model = GPT | EGPT | DeepGPT

_KINDS: dict[str, type[Model]] = {"gpt": GPT, "egpt": EGPT, "deepgpt": DeepGPT}


def build_model(
    config: ModelConfig,
    grid: ProcessGrid,
    *,
    seed: int = 1337,
    activation_checkpointing: Literal["none", "selective", "full"] = "none",
    sequence_parallel: bool = False,
    compile_blocks: bool = False,
    on_host: bool = False,
) -> Model:
    """The trainable model of ``config``, in fp32 on ``grid.device`` or, ``on_host``, in this
    machine's memory; initialised from ``seed``.

    The full weights are the same at any TP size.
    """
    model = empty_model(config, grid)
    initialize(model, seed, grid)
    model.stack.recompute = activation_checkpointing
    model.stack.sequence_parallel = sequence_parallel
    if compile_blocks:
        model.stack.compile_blocks()
    return model if on_host else model.to(grid.device)


def empty_model(config: ModelConfig, grid: ProcessGrid) -> Model:
    """The same without values, for weights to be loaded into."""
    return _KINDS[config.kind](config, grid)


def build_inputs(
    config: ModelConfig,
    encode: Encode | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    token_states: FeatureStore | None = None,
    history: FeatureStore | None = None,
    shares: ChunkShares | None = None,
    predictions: FeatureStore | None = None,
) -> ModelInputs:
    """How a model of ``config`` is called.

    Args:
        encode: the frozen encoder, of the kinds that need one.
        dtype: what the model computes in.
        token_states: store of the chunks' encoder states; None: they are encoded in the loop.
        history: store of the features of earlier chunks; None: they are pooled from the states.
        shares: of the chunks of an egpt or deepgpt under chunk parallelism.
        predictions: store of what a frozen egpt's blocks and head predict; None: they do in the
            loop.
    """
    if not config.needs_encoder:
        return SequenceInputs()
    if encode is None:
        raise ValueError(f"a model of kind {config.kind} reads the states of an encoder: pass it")
    if config.kind == "egpt":
        return EGPTInputs(config, encode, dtype, token_states, history, shares, predictions)
    return ChunkInputs(config, encode, dtype, token_states, shares)


def new_decoder(
    model: Model,
    encoder: FrozenEncoder | None,
    batch_size: int,
    max_tokens: int,
    steps: DecodingSteps | None = None,
    limits: MemoryLimits = AS_IN_TRAINING,
) -> Decoder:
    """Return the decoder that continues texts with ``model``, at most ``max_tokens`` tokens a row;
    EGPT and DeepGPT need their encoder.

    ``steps`` are compiled ones, of a GPT with its head, of another model's encoder without it;
    ``limits`` are those of an EGPT's token memory.
    """
    if isinstance(model, GPT):
        return GPTDecoder(model, batch_size, max_tokens, steps)
    if encoder is None:
        raise ValueError("EGPT and DeepGPT decode the states of an encoder: pass it")
    if isinstance(model, EGPT):
        return EGPTDecoder(model, encoder, batch_size, max_tokens, steps, limits)
    return DeepGPTDecoder(model, encoder, batch_size, max_tokens, steps)


def gpt_of(model: Model, encoder: FrozenEncoder | None) -> GPT:
    """Return the GPT that reads the tokens: the model itself, or another model's encoder."""
    if isinstance(model, GPT):
        return model
    if encoder is None:
        raise ValueError("EGPT and DeepGPT decode the states of an encoder: pass it")
    return encoder.gpt


def meta_model(config: ModelConfig) -> Model:
    """The whole model without memory, to count its parameters and operations."""
    with torch.device("meta"):
        return empty_model(config, ProcessGrid())
