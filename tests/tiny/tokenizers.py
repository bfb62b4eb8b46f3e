"""A small tokenizer trained on the project's own pages, and text that is hard to cut into words."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megaegpt.data.tokenizers.bpe_training import train_byte_level_bpe
from megaegpt.data.tokenizers.definition import TokenizerDefinition
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

VOCAB_SIZE = 700
_PAGES = [Path(__file__).parents[2] / "README.md"]

HARD_TEXT = st.text(
    st.sampled_from(
        " \t\n\r\x0b\x1c\x1f\x85\xa0\u180e\u2003\u2028\u3000\ufeff\x00\u200b"
        "aZäßǅ\u06612²Ⅷ'\u2019sSdmtlvreLL!.,-_/😀e\u0301\u0903\u0378\U00011de3\U0010ffff"
    )
)
"""Characters of all kinds that words are cut by, next to each other."""


@functools.cache
def trained_definition() -> TokenizerDefinition:
    """Of 700 ids, two of them special."""
    texts = [page.read_text(encoding="utf-8") for page in _PAGES]
    return train_byte_level_bpe(texts, "pages", VOCAB_SIZE, ["<|im_start|>"])


@functools.cache
def trained_tokenizer() -> HuggingFaceTokenizer:
    """The tokenizer of :func:`trained_definition`."""
    return HuggingFaceTokenizer(trained_definition())


def changed(**parts: Any) -> TokenizerDefinition:
    """:func:`trained_definition` with other parts of ``tokenizer.json``; ``model`` is merged."""
    definition = copy.deepcopy(trained_definition())
    definition.content["model"].update(parts.pop("model", {}))
    definition.content.update(parts)
    return definition


BLANK_FIRST = {"type": "Metaspace", "replacement": "\u0120", "prepend_scheme": "first"}
"""A pre-tokenizer with a blank before the first word of a text, as Mistral has it."""
_BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    },
}


def with_bos(parts: dict[str, Any] | None = None, **settings: Any) -> HuggingFaceTokenizer:
    """Texts begin with ``<|im_start|>`` by the post-processor, as Llama 3's do by theirs.

    Args:
        parts: other parts of ``tokenizer.json``, as :func:`changed` has them.
        settings: of ``tokenizer_config.json``.
    """
    definition = changed(post_processor=_BOS_FIRST, **(parts or {}))
    definition.settings.update(settings)
    return HuggingFaceTokenizer(definition)
