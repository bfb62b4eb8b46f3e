"""GPT-2's tokenizer in the files that Hugging Face's ``AutoTokenizer`` reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from megaegpt.data.tokenizer import END_OF_TEXT, Tokenizer, byte_alphabet


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json`` into ``folder``.

    Raises:
        OSError: the folder cannot be written.
    """
    to_character = {byte: chr(code) for code, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(to_character[byte] for byte in token)

    vocabulary = {spell(token): rank for rank, token in enumerate(tokenizer.token_bytes)}
    vocabulary[END_OF_TEXT] = tokenizer.eot_token
    merges = [f"{spell(a)} {spell(b)}" for a, b in _merges(tokenizer.token_bytes)]
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": max_length,
        "add_prefix_space": False,
        **{f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")},
    }
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The merge rules, in order, that made each token of more than a byte: the two tokens left of
    it when only the rules before its own are applied.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [_last_pair(token, ranks) for token in tokens if len(token) > 1]


def _last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    first, second = parts
    return first, second
