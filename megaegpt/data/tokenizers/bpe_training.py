"""A byte-level BPE learned from texts, by the library ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megaegpt.data.tokenizer import END_OF_TEXT, whole_characters
from megaegpt.data.tokenizers.byte_alphabet import CHARACTER_OF_BYTE
from megaegpt.data.tokenizers.definition import TokenizerDefinition
from megaegpt.errors import ConfigError, DataError

_BYTES = 256


def train_byte_level_bpe(
    texts: Iterable[str], name: str, vocab_size: int, special_tokens: Sequence[str] = ()
) -> TokenizerDefinition:
    """Learn the merges of the most frequent pairs in words that are cut as GPT-2 cuts them
    (Sennrich et al., 2016; Radford et al., 2019). The same texts give the same tokenizer.

    Args:
        texts: documents.
        name: of the tokenizer.
        vocab_size: ids in all, special tokens and the 256 bytes included; fewer come out where the
            texts have no more pairs that occur twice.
        special_tokens: besides ``<|endoftext|>``, which ends documents and has the id 0.

    Raises:
        ConfigError: special tokens are empty, given twice, no text, or words of the texts, or they
            leave no room for the bytes and a pair.
        DataError: there are no texts.
    """
    special = [END_OF_TEXT, *special_tokens]
    if len(set(special)) < len(special) or "" in special:
        raise ConfigError(f"special tokens must differ and have names: {', '.join(special)}")
    for token in special:
        if whole_characters(token) != token:
            raise ConfigError(f"the special token {token!r} is no text in UTF-8")
    if vocab_size <= _BYTES + len(special):
        raise ConfigError(
            f"a vocabulary of {vocab_size} has no room for the {_BYTES} bytes and {len(special)} "
            f"special tokens, and for what is learned: give {_BYTES + len(special) + 1} at least"
        )
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    content = json.loads(library.to_str())
    if not content["model"]["merges"]:
        raise DataError("there is nothing to learn from: no two letters are twice in the texts")
    _check_no_word_is_special(content["model"], special)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
    }
    return TokenizerDefinition(name, name, content, settings)


def _check_no_word_is_special(model: Mapping[str, Any], special: Sequence[str]) -> None:
    """The vocabulary has each spelling once: a special token that is also a byte, or what a rule
    makes, would be the token of that text, and the text be lost with it.
    """
    learned = {
        "".join(rule.split(" ") if isinstance(rule, str) else rule) for rule in model["merges"]
    }
    for name in special:
        if name in learned or name in CHARACTER_OF_BYTE.values():
            raise ConfigError(
                f"the special token {name!r} is also a word of the texts, which could not be told "
                "from it: put it in brackets such as <|...|>"
            )
