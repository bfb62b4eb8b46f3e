"""A byte-level BPE learned from texts, by the library ``tokenizers``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megaegpt.data.tokenizer import END_OF_TEXT
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
        ConfigError: special tokens are empty or given twice, or leave no room for the bytes.
        DataError: there are no texts.
    """
    special = [END_OF_TEXT, *special_tokens]
    if len(set(special)) < len(special) or "" in special:
        raise ConfigError(f"special tokens must differ and have names: {', '.join(special)}")
    if vocab_size < _BYTES + len(special):
        raise ConfigError(
            f"a vocabulary of {vocab_size} has no room for the {_BYTES} bytes and {len(special)} "
            "special tokens"
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
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
    }
    return TokenizerDefinition(name, name, content, settings)
