"""From what a user names to a tokenizer, and from a tokenizer to files."""

from __future__ import annotations

import json
from pathlib import Path

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.gpt2_tokenizer import VOCABULARY_FILE, GPT2Tokenizer
from megaegpt.errors import DataError

_TOKENIZER_FILE, _SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"


def load_tokenizer(place: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a place.

    Args:
        place: None: GPT-2's, from the installed vocabulary. Else a folder with ``tokenizer.json``
            or GPT-2's ``encoder.json``, a ``.json`` file of the first kind, or a ``.gguf`` file.

    Raises:
        DataError: there is no tokenizer, or it is damaged or of a kind that cannot be used.
    """
    if place is None:
        return GPT2Tokenizer.installed()
    path = Path(place)
    if path.is_dir() and not (path / _TOKENIZER_FILE).is_file():
        if (path / VOCABULARY_FILE).is_file():
            return GPT2Tokenizer.from_folder(path)
        raise DataError(
            f"{path / _TOKENIZER_FILE} is missing, and so is {VOCABULARY_FILE}: the folder must "
            "hold a tokenizer"
        )
    if not path.exists():
        raise DataError(f"{path} does not exist: give a folder with {_TOKENIZER_FILE}, or a file")
    # The library is slow to import, and GPT-2's tokenizer does without it.
    from megaegpt.data.tokenizers.definition import read_definition
    from megaegpt.data.tokenizers.gguf_vocabulary import read_gguf_definition
    from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    read = read_gguf_definition if path.suffix.lower() == ".gguf" else read_definition
    return HuggingFaceTokenizer(read(path))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder, of weights for example, holds a tokenizer's files."""
    return any((folder / name).is_file() for name in (_TOKENIZER_FILE, VOCABULARY_FILE))


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int | None = None) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained`` and :func:`load_tokenizer` read.

    Args:
        folder: exists.
        max_length: tokens that the model beside it sees; None: it is not told.

    Raises:
        OSError: the folder cannot be written.
    """
    for name, content in tokenizer.files().items():
        if name == _SETTINGS_FILE and max_length is not None:
            settings = {**json.loads(content), "model_max_length": max_length}
            content = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
        (folder / name).write_bytes(content)
