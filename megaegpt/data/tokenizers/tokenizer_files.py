"""From what a user names to a tokenizer, and from a tokenizer to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.gpt2_tokenizer import VOCABULARY_FILE, GPT2Tokenizer
from megaegpt.errors import DataError
from megaegpt.files import whole_file

if TYPE_CHECKING:
    from megaegpt.data.tokenizers.definition import TokenizerDefinition

_TOKENIZER_FILE, _SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where a chat template lies beside a tokenizer or weights, for us and for transformers alike."""
_OLDER_FILES = ("vocab.json", "merges.txt")
TOKENIZER_FILES = (
    _TOKENIZER_FILE,
    _SETTINGS_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    *_OLDER_FILES,
    CHAT_TEMPLATE_FILE,
    "generation_config.json",
)
"""Files of a tokenizer beside a model, of which a folder has some."""


def load_tokenizer(place: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a place.

    Args:
        place: None: GPT-2's, from the installed vocabulary. Else a folder with ``tokenizer.json``,
            with ``vocab.json`` and ``merges.txt``, or with GPT-2's ``encoder.json``; a ``.json``
            file of the first kind; a ``.gguf`` file; ``cl100k_base``, ``o200k_base``, or the
            ``.tiktoken`` file of one.

    Raises:
        DataError: there is no tokenizer, or it is damaged or of a kind that cannot be used.
    """
    if place is None:
        return GPT2Tokenizer.installed()
    path = Path(place)
    if path.is_dir() and not _has(path, _TOKENIZER_FILE) and _has(path, VOCABULARY_FILE):
        return GPT2Tokenizer.from_folder(path)
    # The library is slow to import, and GPT-2's tokenizer does without it.
    from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(_definition(path, str(place)))


def _definition(path: Path, name: str) -> TokenizerDefinition:
    from megaegpt.data.tokenizers import definition, gguf_vocabulary, tiktoken_encodings

    if name in tiktoken_encodings.ENCODINGS:
        path = tiktoken_encodings.find_ranks(name)
        return tiktoken_encodings.read_tiktoken_definition(path)
    if not path.exists():
        raise DataError(
            f"{path} does not exist: give a folder with {_TOKENIZER_FILE}, or a file "
            f"(.json, .gguf, .tiktoken), or {' or '.join(tiktoken_encodings.ENCODINGS)}"
        )
    if path.suffix.lower() == ".gguf":
        return gguf_vocabulary.read_gguf_definition(path)
    if path.suffix.lower() == ".tiktoken":
        return tiktoken_encodings.read_tiktoken_definition(path)
    if path.is_dir() and not _has(path, _TOKENIZER_FILE):
        if _has(path, *_OLDER_FILES):
            return definition.read_older_definition(path)
        raise DataError(
            f"{path / _TOKENIZER_FILE} is missing, and so are {' and '.join(_OLDER_FILES)}, or "
            f"{VOCABULARY_FILE}: the folder must hold a tokenizer"
        )
    return definition.read_definition(path)


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder, of weights for example, holds a tokenizer's files."""
    wanted = ((_TOKENIZER_FILE,), (VOCABULARY_FILE,), _OLDER_FILES)
    return any(_has(folder, *names) for names in wanted)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int | None = None) -> None:
    """Write the files that ``AutoTokenizer.from_pretrained`` and :func:`load_tokenizer` read.

    Args:
        folder: exists.
        max_length: tokens that the model beside it sees; None: it is not told.

    Raises:
        OSError: the folder cannot be written.
    """
    # The vocabulary, which is their first, comes last: what a kill leaves without it is none.
    for name, content in reversed(tokenizer.files().items()):
        if name == _SETTINGS_FILE and max_length is not None:
            settings = {**json.loads(content), "model_max_length": max_length}
            content = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)


def remove_tokenizer(folder: Path) -> None:
    """Remove a tokenizer's files, or a link to a folder of them, and the folder if nothing else is
    in it.

    Raises:
        OSError: they cannot be removed.
    """
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        # The vocabulary first, and of its forms the one that is read last: what a kill leaves is
        # the same tokenizer or none.
        for name in (VOCABULARY_FILE, *_OLDER_FILES, *TOKENIZER_FILES):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
