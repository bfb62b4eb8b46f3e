"""OpenAI's encodings ``cl100k_base`` and ``o200k_base``, from the file of their ranks.

tiktoken downloads that file once and keeps it; here it is only looked for, so nothing needs the
network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megaegpt.data.tokenizer import END_OF_TEXT
from megaegpt.data.tokenizers.byte_alphabet import merges_of, spell
from megaegpt.data.tokenizers.definition import (
    TokenizerDefinition,
    added_token,
    byte_level,
    byte_level_content,
)
from megaegpt.errors import DataError
from megaegpt.json_files import read_bytes

_URL = "https://openaipublic.blob.core.windows.net/encodings/"


@dataclass(frozen=True)
class TiktokenEncoding:
    """A published encoding.

    Attributes:
        sha256: of the file of ranks.
        expression: cuts texts into words as tiktoken's does, without its possessive quantifiers,
            which change nothing here: no word could end elsewhere.
        special_tokens: names and ids.
    """

    sha256: str
    expression: str
    special_tokens: Mapping[str, int]


_BLANKS = r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _ENDING = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

ENCODINGS = {
    "cl100k_base": TiktokenEncoding(
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_BLANKS}",
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": TiktokenEncoding(
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        rf"{_BEFORE}{_CAPITALS}*{_SMALL}+{_ENDING}|{_BEFORE}{_CAPITALS}+{_SMALL}*{_ENDING}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    ),
}


def find_ranks(name: str) -> Path:
    """The file that tiktoken keeps of an encoding.

    Raises:
        DataError: it is not there.
    """
    key = hashlib.sha1(f"{_URL}{name}.tiktoken".encode()).hexdigest()
    named = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    file = Path(named or Path(tempfile.gettempdir(), "data-gym-cache"), key)
    if not file.is_file():
        raise DataError(
            f'{name} is not on this machine ({file} does not exist): run `python -c "import '
            f"tiktoken; tiktoken.get_encoding('{name}')\"` where there is a network, or give the "
            f"file {name}.tiktoken"
        )
    return file


def read_tiktoken_definition(file: Path) -> TokenizerDefinition:
    """Of a file of ranks, which is known by its sha256.

    Raises:
        DataError: it cannot be read, or is no published encoding's.
    """
    try:
        content = read_bytes(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {file}: {reason}") from None
    digest = hashlib.sha256(content).hexdigest()
    name = next((name for name, known in ENCODINGS.items() if known.sha256 == digest), None)
    if name is None:
        raise DataError(
            f"{file} is neither {' nor '.join(ENCODINGS)}: its sha256 is of none of them, and a "
            "file of ranks does not say how texts are cut into words"
        )
    return definition_of_ranks(name, str(file), parse_ranks(content, file), ENCODINGS[name])


def parse_ranks(content: bytes, file: Path) -> list[bytes]:
    """Tokens by rank, of a file with a token in base64 and its rank a line.

    Raises:
        DataError: it is damaged.
    """
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranked = {int(rank): base64.b64decode(token, validate=True) for token, rank in pairs}
        return [ranked[rank] for rank in range(len(pairs))]
    except (ValueError, KeyError, binascii.Error) as error:
        raise DataError(f"{file} is damaged: it is no list of tokens and ranks ({error})") from None


def definition_of_ranks(
    name: str, where: str, tokens: list[bytes], encoding: TiktokenEncoding
) -> TokenizerDefinition:
    """In Hugging Face's form: the rules are what ranks make of each token; a token that they do not
    make stands for a word that it is all of.
    """
    pattern = {"Regex": encoding.expression}
    members = [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        byte_level(use_regex=False),
    ]
    special = encoding.special_tokens
    content = byte_level_content(
        {spell(token): rank for rank, token in enumerate(tokens)},
        [[spell(first), spell(second)] for first, second in merges_of(tokens)],
        [added_token(number, special_name) for special_name, number in special.items()],
        {"type": "Sequence", "pretokenizers": members},
        ignore_merges=True,
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    return TokenizerDefinition(name, where, content, settings)
