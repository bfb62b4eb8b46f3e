"""The files of a tokenizer in Hugging Face's form, which travel with the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from megaegpt.config import ModelConfig
from megaegpt.data.tokenizer import END_OF_TEXT_ID

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy what ``source`` has of a tokenizer's files; whether it has any.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return bool(files)


def has_gpt2_vocabulary(config: ModelConfig) -> bool:
    """Whether a model's tokens are those of GPT-2's tokenizer, which is installed with the
    program.
    """
    return config.vocab_size == END_OF_TEXT_ID + 1
