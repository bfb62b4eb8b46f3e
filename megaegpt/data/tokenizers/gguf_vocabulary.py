"""The tokenizer inside a GGUF file, in the keys that llama.cpp reads and writes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.definition import (
    TokenizerDefinition,
    added_token,
    byte_level,
    byte_level_content,
    read_older_definition,
    token_name,
)
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.split_pattern import (
    LLAMA3_SPLIT,
    O200K_SPLIT,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
    split_expression,
)
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.errors import DataError
from megaegpt.json_files import conform

T = TypeVar("T")

_KEY = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_LLAMA3 = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
_SPLITS = {
    LLAMA3_SPLIT: f"{_LLAMA3} dbrx smaug-bpe",
    QWEN2_SPLIT: "qwen2 deepseek-r1-qwen megrez kormo",
    O200K_SPLIT: "gpt-4o llama4",
    TEKKEN_SPLIT: "tekken",
}
_WORDS = "gpt-2 default gpt2 mpt olmo jais phi-2 roberta-bpe trillion granite-docling"
_WORDS_AND_DIGITS = "smollm starcoder refact command-r codeshell exaone minerva-7b"
"""llama.cpp's names of the ways to cut a text: GPT-2's, and GPT-2's with each digit by itself.
The first of each is written."""

_LIKE_LLAMA3 = {*_LLAMA3.split(), "tekken"}
"""Rules with which llama.cpp takes words that are tokens without merging them, and begins texts
with a BOS where no key says whether (``llama_vocab::impl::load`` in its src/llama-vocab.cpp)."""
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Kinds of special tokens in ``tokenizer_config.json``, and in the keys of a GGUF file."""

_ENDS = ("eos", "eot", "eom")
"""Kinds of tokens that end a text: of all of it, of a turn, of a message within a turn."""
_END_OF_MESSAGE = "<|eom_id|>"

# -- reading --------------------------------------------------------------------------------------


def read_gguf_definition(file: Path) -> TokenizerDefinition:
    """Of a byte-level BPE in a GGUF file's metadata.

    Raises:
        DataError: the package ``gguf`` is missing, the file is damaged, or its tokenizer is of
            another kind.
    """
    return _definition(_metadata(file), file)


def _definition(found: Mapping[str, Any], file: Path) -> TokenizerDefinition:
    kind = found.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise DataError(
            f"{file} holds the tokenizer {kind!r:.40}; byte-level BPE (gpt2) alone is read from "
            "GGUF files: give the folder of the model's tokenizer.json"
        )
    tokens, merges = (_list_of(str, found, name, file) for name in ("tokens", "merges"))
    types = [_NORMAL] * len(tokens)
    if f"{_KEY}token_type" in found:
        types = _list_of(int, found, "token_type", file)
    _check_tokens(tokens, types, file)
    pre = str(found.get(f"{_KEY}pre") or "default")
    pre_tokenizer, split = _pre_tokenizer(pre, file)
    content = byte_level_content(
        {
            token: number
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind != _UNUSED
        },
        [merge.split(" ", 1) for merge in merges],
        [
            added_token(number, token, kind == _CONTROL)
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        pre_tokenizer,
        normalizer={"type": "NFC"} if split == QWEN2_SPLIT else None,
        ignore_merges=pre in _LIKE_LLAMA3,
    )
    name = str(found.get("general.name") or file.stem)
    ends = tuple(end for kind in _ENDS if type(end := found.get(f"{_KEY}{kind}_token_id")) is int)
    settings = _settings(found, tokens, file)
    return TokenizerDefinition(name, str(file), content, settings, ends, is_gguf=True)


def _list_of(kind: type[T], found: Mapping[str, Any], name: str, file: Path) -> list[T]:
    schema: Any = list[kind]  # type: ignore[valid-type]
    values: list[T] = conform(found.get(_KEY + name), schema, f"{file}: {_KEY}{name}")
    return values


def _check_tokens(tokens: list[str], types: list[int], file: Path) -> None:
    """Each has one type, and no two of them are the same: one would hide the other."""
    if len(types) != len(tokens):
        raise DataError(f"{file} is damaged: {len(tokens):,} tokens have {len(types):,} types")
    if len(set(tokens)) < len(tokens):
        again = next(name for name, count in Counter(tokens).items() if count > 1)
        raise DataError(f"{file} is damaged: its token {again!r:.40} is there twice")


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


def _settings(found: Mapping[str, Any], tokens: list[str], file: Path) -> dict[str, Any]:
    """Return the ``tokenizer_config.json`` that belongs to such a tokenizer. Ids that are no tokens
    do not count, as for llama.cpp, but for that of the end, without which texts do not end.
    """
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in _SPECIAL.items():
        number = found.get(f"{_KEY}{theirs}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            settings[f"{ours}_token"] = tokens[number]
        elif ours == "eos" and number is not None:
            raise DataError(
                f"{file} is damaged: its eos_token_id {number!r:.40} is none of its "
                f"{len(tokens):,} tokens"
            )
    if isinstance(template := found.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    adds = found.get(f"{_KEY}add_bos_token", found.get(f"{_KEY}pre") in _LIKE_LLAMA3)
    if isinstance(adds, bool):
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


# -- writing --------------------------------------------------------------------------------------


def gguf_vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any] | None:
    """The metadata by which llama.cpp, and :func:`read_gguf_definition`, have ``tokenizer``.

    Args:
        rows: of the model's embedding: llama.cpp wants as many tokens, and those without a token
            here are unused.

    Returns:
        None where the keys cannot say it: it is no byte-level BPE, or cuts texts by a rule without
        a name there.
    """
    definition = _definition_of(tokenizer)
    model, splits = definition.content["model"], definition.content.get("pre_tokenizer")
    rule = _name_of_rule(splits)
    if rule is None or model.get("type", "BPE") != "BPE" or tokenizer.vocab_size > rows:
        return None
    kinds = dict.fromkeys(definition.vocabulary, _NORMAL)
    kinds |= {token["content"]: _USER_DEFINED for token in definition.added_tokens}
    kinds |= dict.fromkeys(tokenizer.special_tokens, _CONTROL)
    names = {number: name for name, number in definition.vocabulary.items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(rows)]
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"]]
    found = {
        "tokenizer.ggml.model": "gpt2",
        f"{_KEY}pre": rule,
        f"{_KEY}tokens": tokens,
        f"{_KEY}token_type": [kinds.get(token, _UNUSED) for token in tokens],
        f"{_KEY}merges": merges,
        **_special_tokens(definition, tokenizer),
    }
    try:
        again = HuggingFaceTokenizer(_definition(found, Path("vocabulary.gguf")))
    except DataError:
        return None
    return found if again.fingerprint == tokenizer.fingerprint else None


def _definition_of(tokenizer: Tokenizer) -> TokenizerDefinition:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.definition
    with tempfile.TemporaryDirectory() as folder:  # GPT-2's, in its files of Hugging Face's
        save_tokenizer(tokenizer, Path(folder))
        return read_older_definition(Path(folder))


def _name_of_rule(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name of the way in which a pre-tokenizer cuts texts; None: it has none."""
    wanted = split_expression(pre_tokenizer)
    for name in (_WORDS, _WORDS_AND_DIGITS, *_SPLITS.values()):
        first = name.split()[0]
        if wanted is not None and split_expression(_pre_tokenizer(first, Path())[0]) == wanted:
            return first
    return None


def _special_tokens(definition: TokenizerDefinition, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of special tokens, whether a text begins with one, and the chat template."""
    settings, ids = definition.settings, definition.vocabulary
    named = {kind: token_name(settings.get(f"{kind}_token")) for kind in _SPECIAL}
    found: dict[str, Any] = {
        f"{_KEY}{_SPECIAL[kind]}_token_id": ids[name]
        for kind, name in named.items()
        if name is not None and name in ids
    }
    others = tokenizer.end_tokens - {tokenizer.eot_token}
    of_a_message = ids.get(_END_OF_MESSAGE)  # Llama 3.1's, before a call of a tool
    ends = [tokenizer.eot_token, *sorted(others, key=lambda end: (end == of_a_message, end))]
    found |= {f"{_KEY}{kind}_token_id": end for kind, end in zip(_ENDS, ends, strict=False)}
    if tokenizer.bos_token is not None:
        found[f"{_KEY}bos_token_id"] = tokenizer.bos_token
    found[f"{_KEY}add_bos_token"] = tokenizer.adds_bos
    if definition.chat_template is not None:
        found["tokenizer.chat_template"] = definition.chat_template
    return found
