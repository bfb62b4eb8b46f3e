"""The tokenizer inside a GGUF file, as llama.cpp writes it, in Hugging Face's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaegpt.data.tokenizers.definition import (
    TokenizerDefinition,
    added_token,
    byte_level,
    byte_level_content,
)
from megaegpt.data.tokenizers.split_pattern import (
    LLAMA3_SPLIT,
    O200K_SPLIT,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
)
from megaegpt.errors import DataError

_KEY = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_SPLITS = {
    LLAMA3_SPLIT: "llama3 llama-v3 llama-bpe falcon3 dbrx smaug-bpe pixtral lfm2",
    QWEN2_SPLIT: "qwen2 deepseek-r1-qwen megrez kormo",
    O200K_SPLIT: "gpt-4o llama4",
    TEKKEN_SPLIT: "tekken",
}
_WORDS = "default gpt-2 gpt2 mpt olmo jais phi-2 roberta-bpe trillion granite-docling"
_WORDS_AND_DIGITS = "smollm starcoder refact command-r codeshell exaone minerva-7b"
"""llama.cpp's names of the ways to cut a text: GPT-2's, and GPT-2's with each digit by itself."""

_IGNORING_MERGES = {LLAMA3_SPLIT, TEKKEN_SPLIT}


def read_gguf_definition(file: Path) -> TokenizerDefinition:
    """Of a byte-level BPE in a GGUF file's metadata.

    Raises:
        DataError: the package ``gguf`` is missing, the file is damaged, or its tokenizer is of
            another kind.
    """
    found = _metadata(file)
    kind = found.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise DataError(
            f"{file} holds the tokenizer {kind!r:.40}; byte-level BPE (gpt2) alone is read from "
            "GGUF files: give the folder of the model's tokenizer.json"
        )
    tokens, merges = found.get(f"{_KEY}tokens"), found.get(f"{_KEY}merges")
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise DataError(f"{file} is damaged: its tokenizer has no tokens or no merges")
    types = found.get(f"{_KEY}token_type") or [_NORMAL] * len(tokens)
    pre = str(found.get(f"{_KEY}pre") or "default")
    pre_tokenizer, split = _pre_tokenizer(pre, file)
    content = byte_level_content(
        {token: number for number, token in enumerate(tokens)},
        [merge.split(" ", 1) for merge in merges],
        [
            added_token(number, token, kind == _CONTROL)
            for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        pre_tokenizer,
        normalizer={"type": "NFC"} if split == QWEN2_SPLIT else None,
        ignore_merges=split in _IGNORING_MERGES,
    )
    name = str(found.get("general.name") or file.stem)
    return TokenizerDefinition(name, str(file), content, _settings(found, tokens))


def _pre_tokenizer(pre: str, file: Path) -> tuple[dict[str, Any], str | None]:
    """The pre-tokenizer by llama.cpp's name, and the expression of its split."""
    if pre in _WORDS.split():
        return byte_level(), None
    first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    split = next((s for s, names in _SPLITS.items() if pre in names.split()), None)
    if split is not None:
        pattern = {"Regex": split}
        first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    elif pre not in _WORDS_AND_DIGITS.split():
        raise DataError(
            f"{file}: its tokenizer cuts texts by the unknown rule {pre!r:.40}: give the folder of "
            "the model's tokenizer.json instead"
        )
    members = [first, byte_level(use_regex=split is None)]
    return {"type": "Sequence", "pretokenizers": members}, split


def _settings(found: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` that belongs to such a tokenizer."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = found.get(f"{_KEY}{theirs}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            settings[f"{ours}_token"] = tokens[number]
    if isinstance(template := found.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    if isinstance(adds := found.get(f"{_KEY}add_bos_token"), bool):
        settings["add_bos_token"] = adds
    return settings


def _metadata(file: Path) -> dict[str, Any]:
    """Read a GGUF file's metadata of its tokenizer; the tensors are not read."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise DataError(f"reading {file} needs the package gguf: pip install gguf") from None
    try:
        fields = GGUFReader(file).fields
        wanted = [key for key in fields if key.startswith("tokenizer.") or key == "general.name"]
        return {key: fields[key].contents() for key in wanted}
    except Exception as error:  # the package has no errors of its own
        raise DataError(f"{file} is damaged or no GGUF file: {str(error)[:200]}") from None
