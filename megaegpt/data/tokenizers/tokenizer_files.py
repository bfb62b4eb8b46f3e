"""From what a user names to a tokenizer, and from a tokenizer to files."""

from __future__ import annotations

import json
from pathlib import Path

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.gpt2_tokenizer import VOCABULARY_FILE, GPT2Tokenizer
from megaegpt.errors import DataError


def load_tokenizer(place: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a place.

    Args:
        place: None: GPT-2's, from the installed vocabulary. Else a folder with GPT-2's
            ``encoder.json``.

    Raises:
        DataError: there is no tokenizer, or it is damaged or of a kind that cannot be used.
    """
    if place is None:
        return GPT2Tokenizer.installed()
    folder = Path(place)
    if not (folder / VOCABULARY_FILE).is_file():
        raise DataError(
            f"{folder / VOCABULARY_FILE} is missing: the vocabulary folder must hold GPT-2's files"
        )
    return GPT2Tokenizer.from_folder(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder, of weights for example, holds a tokenizer's files."""
    return (folder / VOCABULARY_FILE).is_file()


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int | None = None) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained`` and :func:`load_tokenizer` read.

    Args:
        folder: exists.
        max_length: tokens that the model beside it sees; None: it is not told.

    Raises:
        OSError: the folder cannot be written.
    """
    for name, content in tokenizer.files().items():
        if name == "tokenizer_config.json" and max_length is not None:
            settings = {**json.loads(content), "model_max_length": max_length}
            content = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(content)
