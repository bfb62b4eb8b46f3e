"""The tokenizer that travels with a model's weights, from one form of them to another."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaegpt.config import ModelConfig
from megaegpt.data.instruction.chat_template import load_chat_template, read_template_file
from megaegpt.data.tokenizer import END_OF_TEXT_ID, Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    TOKENIZER_FILES,
    has_tokenizer,
    load_tokenizer,
)
from megaegpt.errors import CheckpointError, DataError
from megaegpt.gguf_files import SUFFIX
from megaegpt.model.weights import INSTRUCTIONS


def tokenizer_beside(
    source: Path, config: ModelConfig, trained_with: str | None = None
) -> Tokenizer | None:
    """The tokenizer that a folder of weights or a GGUF file has. Where it has none, GPT-2's, if the
    model was trained with it or, where that is not said, has its vocabulary. None: there is none,
    or one that cannot be used.

    Args:
        trained_with: ``tokenizer_fingerprint`` of weights of ours, where they say it.

    Raises:
        CheckpointError: it has ids that the model has no rows for, so it is another model's.
    """
    if source.suffix == SUFFIX or has_tokenizer(source):
        try:
            tokenizer = load_tokenizer(source)
        except DataError as error:
            print(f"notice: no tokenizer goes with the weights: {error}", file=sys.stderr)
            return None
        if tokenizer.vocab_size > config.vocab_size:
            advice = "; without its files the weights alone are taken"
            raise CheckpointError(
                f"{source} holds a tokenizer of {tokenizer.vocab_size} tokens and a model of "
                f"{config.vocab_size}: it is another model's"
                f"{'' if source.suffix == SUFFIX else advice}"
            )
        return tokenizer
    if trained_with is None:
        return load_tokenizer() if _has_gpt2_vocabulary(config) else None
    tokenizer = load_tokenizer()
    has_rows = tokenizer.vocab_size <= config.vocab_size
    return tokenizer if has_rows and tokenizer.fingerprint == trained_with else None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer that lie in one folder of weights into another.

    Raises:
        OSError: they cannot be read or written.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def tuned_template(
    weights: Path, extra: Mapping[str, Any], tokenizer: Tokenizer | None
) -> str | None:
    """Jinja of the chat template that weights of ours were tuned on, whatever their tokenizer was
    made for: Alpaca's for tasks, else that of the file beside them. None: they were on none.

    Raises:
        DataError: the file cannot be read.
    """
    if extra.get(INSTRUCTIONS) == "tasks" and tokenizer is not None:
        return load_chat_template(tokenizer, "alpaca").source
    file = weights / CHAT_TEMPLATE_FILE
    return read_template_file(file) if file.is_file() else None


def write_tuned_template(
    weights: Path, extra: Mapping[str, Any], tokenizer: Tokenizer | None, folder: Path
) -> None:
    """Write :func:`tuned_template` where transformers look for it, before the tokenizer's own.

    Raises:
        DataError: as there.
        OSError: the folder cannot be written.
    """
    if (source := tuned_template(weights, extra, tokenizer)) is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(source, encoding="utf-8", newline="")


def is_gpt2_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> bool:
    """Whether weights without a tokenizer beside them are taken for this one's, and nothing of it
    would be lost.
    """
    if not _has_gpt2_vocabulary(config) or tokenizer.chat_template is not None:
        return False
    if tokenizer.adds_bos or len(tokenizer.end_tokens) > 1:
        return False
    return tokenizer.is_installed or tokenizer.fingerprint == load_tokenizer().fingerprint


def _has_gpt2_vocabulary(config: ModelConfig) -> bool:
    """Whether a model's tokens are those of GPT-2's tokenizer, which is installed with the
    program.
    """
    return config.vocab_size == END_OF_TEXT_ID + 1
