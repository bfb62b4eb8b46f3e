"""A trained model from disk, with the encoder and the tokenizer it was trained with."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from megaegpt.config import ModelConfig
from megaegpt.config.validation import validate_model
from megaegpt.data.instruction.chat_template import ChatTemplate, load_chat_template
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import has_tokenizer, load_tokenizer
from megaegpt.errors import CheckpointError, ConfigError
from megaegpt.interop.sources import resolve_base, resolve_weights_source
from megaegpt.interop.vocabulary_files import tuned_template
from megaegpt.model.adapter_files import load_merged, read_adapter
from megaegpt.model.build import Model, empty_model
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.head import OutputHead
from megaegpt.model.weights import INSTRUCTIONS, is_adapter, load_weights, read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.int8_weights import Int8Weight, int8_weight
from megaegpt.parallel.kernels import KernelTable, choose_kernels, kernel_choice
from megaegpt.parallel.layers import Linear, RowParallelLinear, VocabParallelEmbedding
from megaegpt.parallel.matmul import SMALLEST, packed_order


class LoadedModel(NamedTuple):
    """A trained model with all that generation needs beside it."""

    model: Model
    """In eval mode, without gradients, on the grid's device."""
    encoder: FrozenEncoder | None
    """The encoder of an EGPT or DeepGPT."""
    tokenizer: Tokenizer
    is_own_tokenizer: bool = True
    """``tokenizer`` is the one that the model was trained with, as far as its weights say: its
    token ids are those of the texts, and what a token is in bytes is known."""
    chat_template: ChatTemplate | None = None
    """How it is talked to: the template that lies with the weights, else its tokenizer's own."""
    asked_in_chats: bool = False
    """An instruction is a user's message in that template, and no task in Alpaca's prompt."""


def load_for_inference(
    folder: str | Path,
    grid: ProcessGrid,
    dtype: torch.dtype = torch.float32,
    *,
    encoder_source: str | None = None,
    vocabulary: str | None = None,
    int8: bool = False,
) -> LoadedModel:
    """Load whatever :func:`~megaegpt.interop.sources.resolve_weights_source` finds at ``folder``;
    adapters are added to the weights beside which they were trained.

    The encoder of an EGPT or DeepGPT is loaded from the source that its configuration names (from
    the working directory, else from beside the weights), or from ``encoder_source``, and must be
    the very one it was trained with. The tokenizer is that of ``vocabulary``, else the one whose
    files lie with the weights, else GPT-2's. Collective over all ranks.

    Args:
        int8: round the matrices as :func:`round_to_int8` does, on a CPU.

    Raises:
        CheckpointError: something is missing or damaged, or the encoder is another one.
        ConfigError: the weights' description is not valid or does not fit the tensor-parallel size,
            or ``encoder_source`` is given for a model that has no encoder.
        DataError: the tokenizer's vocabulary cannot be had.
    """
    weights = resolve_weights_source(folder, grid)
    adapter = read_adapter(weights) if is_adapter(weights) else None
    if adapter is None:
        config, extra = read_weights_config(weights)
    else:
        config, extra = adapter.config, adapter.extra
    validate_model(config, str(weights), grid.tp_size)
    if encoder_source is not None and not config.needs_encoder:
        raise ConfigError(
            f"{weights} is a plain gpt, without an encoder: leave the encoder {encoder_source} out"
        )
    lies_beside = vocabulary is None and has_tokenizer(weights)
    tokenizer = load_tokenizer(weights if lies_beside else vocabulary)
    if config.vocab_size < tokenizer.vocab_size:
        raise CheckpointError(
            f"{weights} has a vocabulary of {config.vocab_size} tokens, the tokenizer "
            f"{tokenizer.name} has {tokenizer.vocab_size}: it was not trained on this tokenizer's "
            "text; give its own as --vocabulary"
        )
    encoder = None
    if config.needs_encoder:
        source = encoder_source or config.encoder.source
        encoder = _load_encoder(config, source, weights, extra, grid)
        encoder.to(dtype)
    model = empty_model(config, grid).to(device=grid.device, dtype=dtype)
    if adapter is None:
        load_weights(model, weights, grid)
    else:
        load_merged(model, adapter, resolve_base(adapter, grid), grid)
    model.requires_grad_(False).eval()
    for part in (model, encoder):
        if part is not None:
            (round_to_int8 if int8 else choose_products)(part)
    trained_with = extra.get("tokenizer_fingerprint")
    if trained_with is None:
        own = lies_beside or config.vocab_size <= tokenizer.padded_vocab_size
    else:
        own = trained_with == tokenizer.fingerprint
    if not own and grid.is_main:
        print(
            f"warning: {weights} was not trained with the tokenizer {tokenizer.name}, whose ids "
            "mean other texts to it: give its own as --vocabulary",
            file=sys.stderr,
        )
    chat = _chat_template(weights, tokenizer, extra)
    in_chats = chat is not None and _is_asked_in_chats(chat, tokenizer, extra)
    return LoadedModel(model, encoder, tokenizer, own, chat, in_chats)


def _chat_template(
    weights: Path, tokenizer: Tokenizer, extra: Mapping[str, Any]
) -> ChatTemplate | None:
    if (source := tuned_template(weights, extra, tokenizer)) is not None:
        return ChatTemplate(source, f"of {weights}")
    return None if tokenizer.chat_template is None else load_chat_template(tokenizer)


def _is_asked_in_chats(chat: ChatTemplate, tokenizer: Tokenizer, extra: Mapping[str, Any]) -> bool:
    """Weights of another form do not say what they were tuned on, those among them that were ours
    before; their template does: what was tuned on tasks is exported with Alpaca's.
    """
    if INSTRUCTIONS in extra:
        return bool(extra[INSTRUCTIONS] == "chats")
    return chat.source != load_chat_template(tokenizer, "alpaca").source


def choose_products(model: nn.Module) -> None:
    """Let each product of ``model`` on a CPU be the library's that is the fastest here, and read
    its weight in the order that suits it (bf16: which takes the memory of the weights once more).
    The model is for inference from here on, and its weights must not change.

    Raises:
        ConfigError: ``MEGAEGPT_KERNELS`` is none of its values.
    """
    kernel_choice()  # is checked, whether it means something for this model or not
    modules = [part for part in model.modules() if isinstance(part, Linear | OutputHead)]
    if not modules or modules[0].weight.device.type != "cpu":
        return
    is_tiny = max(module.weight.numel() for module in modules) < SMALLEST  # all are torch's own
    table = KernelTable() if is_tiny else choose_kernels(modules[0].grid.world_size)
    for module in modules:
        module.blas_rows = table.blas_rows(module.weight)
        if 1 not in module.blas_rows:  # a token at a time is what the memory is spent on
            module.packed = packed_order(module.weight)


def round_to_int8(model: nn.Module) -> None:
    """Put the matrices of ``model``, those of its tokens among them, into int8 with a scale for
    each row, one by one; what is small or of one dimension stays. The model is for inference from
    here on: where a matrix was are numbers that are none, and take no memory.
    """
    rounded: dict[nn.Parameter, Int8Weight] = {}  # a tied head has the embedding's
    for module in model.modules():
        if not isinstance(module, Linear | OutputHead | VocabParallelEmbedding):
            continue
        parameter = module.weight
        if parameter not in rounded:
            used = module.factors()[0] if isinstance(module, Linear) else parameter
            others = module.grid if isinstance(module, RowParallelLinear) else None
            rounded[parameter] = int8_weight(used.detach(), others)
            parameter.data = parameter.new_full((), torch.nan).expand(parameter.shape)
        module.packed = rounded[parameter]


def _load_encoder(
    config: ModelConfig,
    source: str | None,
    weights: Path,
    extra: Mapping[str, Any],
    grid: ProcessGrid,
) -> FrozenEncoder:
    if source is None or extra.get("encoder_fingerprint") is None:
        raise CheckpointError(f"{weights} does not say which encoder it was trained with")
    try:
        folder = resolve_weights_source(source, grid, beside=weights)
    except CheckpointError as error:
        raise CheckpointError(f"the encoder of {weights} cannot be loaded: {error}") from None
    encoder_config = dataclasses.replace(config.encoder, source=str(folder))
    encoder = FrozenEncoder.from_source(encoder_config, grid)
    if (difference := encoder.difference(extra)) is not None:
        raise CheckpointError(
            f"{source} is not the encoder that {weights} was trained with: {difference}"
        )
    return encoder
