"""A tokenizer in the files that Hugging Face's ``AutoTokenizer`` reads."""

from __future__ import annotations

from pathlib import Path

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """:func:`~megaegpt.data.tokenizers.tokenizer_files.save_tokenizer` of an exported model.

    Raises:
        OSError: the folder cannot be written.
    """
    save_tokenizer(tokenizer, folder, max_length)
