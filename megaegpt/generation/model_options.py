"""The part of the command line that all programs which use a trained model share."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from megaegpt.arguments import integer, path
from megaegpt.bars import telling_if_slow
from megaegpt.config import GenerationConfig
from megaegpt.errors import ConfigError

if TYPE_CHECKING:  # torch is imported once the command line is right
    from megaegpt.generation.trained import LoadedModel
    from megaegpt.model.build import Model
    from megaegpt.model.egpt.held_tokens import MemoryLimits
    from megaegpt.parallel.grid import ProcessGrid

_DEFAULT_CONTEXT = 4096


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which model it is, and in what precision it computes."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path,
        metavar="PATH",
        help="the trained model: a run, a checkpoint, weights of ours or in Hugging Face's form, a "
        "GGUF file, or a model's name",
    )
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32", "int8"),
        help="precision (default: bf16 on a GPU, fp32 on a CPU); int8, on a CPU: matrices are "
        "rounded to 8 bits and a scale for each row, a quarter of fp32's memory and fewer bytes to "
        "read for a token",
    )
    parser.add_argument(
        "--encoder", metavar="PATH", help="of an EGPT or DeepGPT, where it was moved"
    )
    parser.add_argument(
        "--vocabulary", metavar="PLACE", help="the tokenizer, where none lies with the weights"
    )


def load_model(arguments: argparse.Namespace, grid: ProcessGrid | None = None) -> LoadedModel:
    """The model that the options of :func:`add_model_options` name. Collective over all ranks.

    Args:
        grid: None: this process alone, on its GPU if it has one.

    Raises:
        MegaEGPTError: what :func:`~megaegpt.generation.trained.load_for_inference` raises.
    """
    is_main = grid is None or grid.is_main
    told = telling_if_slow(f"loading {arguments.checkpoint} ...")
    with told if is_main else contextlib.nullcontext():
        from megaegpt.generation.trained import load_for_inference
        from megaegpt.parallel.affinity import limit_threads
        from megaegpt.parallel.devices import local_device
        from megaegpt.parallel.grid import ProcessGrid
        from megaegpt.precision import INT8, inference_dtype

        if grid is None:
            grid = ProcessGrid(device=local_device())
            if grid.device.type == "cpu":
                limit_threads()
        return load_for_inference(
            arguments.checkpoint,
            grid,
            inference_dtype(arguments.dtype, grid.device),
            encoder_source=arguments.encoder,
            vocabulary=arguments.vocabulary,
            int8=arguments.dtype == INT8,
        )


def add_sampling_options(parser: argparse.ArgumentParser, defaults: GenerationConfig) -> None:
    """Add what :func:`sampling_config` reads, but for the length of a text."""
    parser.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="below 1 the likely becomes likelier; 0 always takes the likeliest token "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="draw among the K likeliest tokens only; 0: among all (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the fewest tokens that hold the probability P (default: off)",
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="of the sampling (default: %(default)s)"
    )


def add_context_option(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`context_of` reads."""
    parser.add_argument(
        "--context",
        type=integer(2),
        metavar="N",
        help="of a GPT: most tokens of a prompt and its answer, for which memory is taken in "
        f"advance (default: the model's, at most {_DEFAULT_CONTEXT:,})",
    )


def context_of(arguments: argparse.Namespace, model: Model) -> int | None:
    """Most tokens of a text and what is written behind it; None: any number.

    Raises:
        ConfigError: the model sees fewer, or any number.
    """
    config, wanted = model.config, arguments.context
    if config.needs_encoder:
        if wanted is not None:
            raise ConfigError(f"--context is for a gpt: an {config.kind} takes texts of any length")
        return None
    if wanted is not None and wanted > config.max_seq_len:
        raise ConfigError(f"--context {wanted} is more than the model sees: {config.max_seq_len}")
    return wanted or min(config.max_seq_len, _DEFAULT_CONTEXT)


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`memory_limits` reads."""
    parser.add_argument(
        "--memory-tokens",
        type=integer(1),
        metavar="N",
        help="of an EGPT with token_memory: tokens of earlier chunks that it holds, the newest, in "
        "whole chunks (default: as many as a training window shows)",
    )
    parser.add_argument(
        "--memory-dtype",
        choices=("fp32", "fp16", "int8"),
        help="of their keys (default: the model's)",
    )


def memory_limits(arguments: argparse.Namespace, model: Model) -> MemoryLimits:
    """What a token memory may hold of a text, which the main rank shows.

    Raises:
        ConfigError: the model has none, or would hold not a chunk.
    """
    from megaegpt.model.egpt.egpt import EGPT
    from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING, HeldTokens, MemoryLimits

    limits = MemoryLimits(arguments.memory_tokens, arguments.memory_dtype)
    memory = model.token_memory if isinstance(model, EGPT) else None
    if memory is None:
        if limits != AS_IN_TRAINING:
            raise ConfigError(
                "--memory-tokens and --memory-dtype are for an egpt with token_memory"
            )
        return limits
    held = HeldTokens(memory, 1, model.head.weight, limits)
    if model.grid.is_main:
        size = held.size(held.most_chunks * memory.chunk_size)
        print(f"token memory: up to {size} of earlier text", file=sys.stderr)
    return limits


def sampling_config(arguments: argparse.Namespace) -> GenerationConfig:
    """How texts are drawn. Its values are checked by
    :func:`~megaegpt.generation.sampling.check_sampling`.
    """
    return GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k or None,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
