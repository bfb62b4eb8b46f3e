"""A tokenizer in Hugging Face's form: ``tokenizer.json``, by the library ``tokenizers`` or faster.

Byte-level BPE (GPT-2's, Llama 3's, Qwen's, SmolLM2's kind) runs on tiktoken's core where that gives
the library's ids: its merge rules are proved to be in the order of ranks, its expression is one
that both engines understand alike, and a sample of text is compared when it is loaded. Whatever the
core cannot do, single texts included, the library does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers

from megaegpt.data.tokenizer import Tokenizer, whole_characters
from megaegpt.data.tokenizers.byte_alphabet import unspell
from megaegpt.data.tokenizers.byte_pair_core import BytePairCore
from megaegpt.data.tokenizers.definition import (
    GENERATION_FILE,
    NAMED,
    SETTINGS_FILE,
    TOKENIZER_FILE,
    TokenizerDefinition,
    begin_with,
    serialized,
    token_name,
)
from megaegpt.data.tokenizers.merge_order import MergeOrder, merge_order
from megaegpt.data.tokenizers.split_pattern import split_expression
from megaegpt.errors import DataError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PLACE_IN_JSON = re.compile(r" at line \d+ column \d+")
_BLANK_MARK = "\u2581"
_TEMPLATES = ("TemplateProcessing", "RobertaProcessing", "BertProcessing")
_GPT2_DIGEST = "5834566ba7a113a3493831eb98ffca7a823466defe0d57779312bf57c98f2739"
_GPT2_FINGERPRINT = "174dffdb4eee00b0177de2abc4436adbce393a6620dde6188138d5036f0dc622"
"""The fingerprint in all shards and weights of GPT-2's tokenizer."""

SAMPLE = (
    "Hello world, it's 1999 and they'LL pay  12,345.67 €!\r\n\r\n\tdef f(x):\n        return x\n",
    "   7 apples   x  \n 3\u00a0½ Ⅷ ٣٤ naïve e\u0301 Ångström 你好。日本語 한국 русский אב ال ก็",
    "\u0939\u093f\u0928\u094d\u0926 ǅ ʰ \u017fs '\u017f 'S \u2019s \U0001f468\u200d\U0001f469 🇩🇪",
    " \u200b\ufeff\u2028\u3000 \x00\x1f\x7f\x85 \ue000 \u0378 \U000e0001 \U00011de3 \U00016ff4",
    "<|endoftext|> </s> <think> aaaaaaaaa ---- ==== a/b/c...?! (quoted)\n\n \n  \n\t\t \n   ",
    "HTTPServer camelCase XMLHttp İstanbul ßẞ snake_case 0x1F 3e-7 'twas I'd we've\n \t ",
)
"""Texts of every kind that expressions tell apart, with blanks at their ends."""


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a definition.

    Raises:
        DataError: the definition is damaged, or of a kind whose ids do not give texts back.
    """

    def __init__(self, definition: TokenizerDefinition) -> None:
        self.definition, self.name = definition, whole_characters(definition.name)
        self._vocabulary = definition.vocabulary
        end = definition.end_of_text(self._vocabulary)
        self._library = _library_of(definition, end)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.chat_template = definition.chat_template
        self.eot_token = self._vocabulary[end]
        special = [t["content"] for t in definition.added_tokens if t.get("special")]
        self.special_tokens = {name: self._vocabulary[name] for name in (*special, end)}
        named = token_name(definition.settings.get("bos_token"))
        self.bos_token = self._vocabulary.get(named or "")
        self._find_rule_of_bos()
        self._is_byte_level = _is_byte_level(definition)
        self._order = self._merge_order() if self._is_byte_level else None
        self._normalizes = definition.content.get("normalizer") is not None
        self._core, self.runs_on = self._fastest()

    def _find_rule_of_bos(self) -> None:
        """Texts begin with a BOS where ``add_bos_token`` in the settings says so, else where the
        file's post-processor does.
        """
        said = self.definition.settings.get("add_bos_token")
        if isinstance(said, bool):
            self.adds_bos = said and self.bos_token is not None
            return
        if (first := self._first_by_file) is not None:
            self.bos_token, self.adds_bos = first, True

    @cached_property
    def _first_by_file(self) -> int | None:
        """What the file's post-processor puts before a text."""
        whole = self._library.encode("a").ids
        part = self._library.encode("a", add_special_tokens=False).ids
        return whole[0] if whole[:1] != part[:1] else None

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids at which a model stops to write."""
        known = set(self._vocabulary.values())
        return frozenset({self.eot_token, *known.intersection(self.definition.ends)})

    # -- encoding ----------------------------------------------------------------------------------

    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of ``text`` as ``dtype``; lone surrogates count as U+FFFD."""
        if self._core is not None and (ids := self._encode_by_core(text)) is not None:
            return ids
        return self._encode_by_library(text)

    def encode_part(self, text: str, is_first: bool) -> list[int]:
        """Ids of what is between special tokens, where some put no blank before a word."""
        if is_first or self._within_texts is None:
            return self.encode(text)
        return list(self._within_texts.encode(whole_characters(text), add_special_tokens=False).ids)

    @cached_property
    def _within_texts(self) -> tokenizers.Tokenizer | None:
        """The library's tokenizer behind the begin of a text, where it is another: one that puts a
        blank before the first word alone.
        """
        plain = _without_first_blank(self.definition.content.get("pre_tokenizer"))
        if plain == self.definition.content.get("pre_tokenizer"):
            return None
        content = {**self.definition.content, "pre_tokenizer": plain}
        return _library_of(dataclasses.replace(self.definition, content=content), self.end_of_text)

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        """With the white space that is part of a special token by its flags."""
        flags = {token["content"]: token for token in self.definition.added_tokens}
        patterns = []
        for name in sorted(self.special_tokens, key=len, reverse=True):
            token = flags.get(name, {})
            before = r"\s*" if token.get("lstrip") else ""
            after = r"\s*" if token.get("rstrip") else ""
            patterns.append(before + re.escape(name) + after)
        return re.compile(f"({'|'.join(patterns) or '(?!)'})")

    @property
    def template_variables(self) -> dict[str, str]:
        """Of the special tokens that the settings name."""
        settings = self.definition.settings
        named = {f"{kind}_token": token_name(settings.get(f"{kind}_token")) for kind in NAMED}
        return {kind: name for kind, name in named.items() if name is not None} | {
            "eos_token": self.end_of_text
        }

    def _encode_by_library(self, text: str) -> np.ndarray:
        try:
            ids = self._library.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # as releases of the library refuse surrogates
            ids = self._library.encode(whole_characters(text), add_special_tokens=False).ids
        return np.array(ids, self.dtype)

    def _encode_by_core(self, text: str) -> np.ndarray | None:
        assert self._core is not None
        if not any(name in text for name in self._plain_added_tokens):
            return self._core.encode(self._normalized(text))
        rows = [np.empty(0, self.dtype)]
        for number, part in enumerate(self._plain_names.split(text)):
            if number % 2:
                rows.append(np.array([self._plain_added_tokens[part]], self.dtype))
            elif (row := self._core.encode(self._normalized(part))) is not None:
                rows.append(row)
            else:
                return None
        return np.concatenate(rows)

    def _normalized(self, text: str) -> str:
        """In NFC, as the library has it; Python's is of an earlier Unicode, and asked only about
        characters that it knows.
        """
        if not self._normalizes or text.isascii():
            return text
        if unicodedata.is_normalized("NFC", text) and not _unknown_to_python().search(text):
            return text
        normalized: str = normalizers.NFC().normalize_str(whole_characters(text))
        return normalized

    @cached_property
    def _plain_added_tokens(self) -> dict[str, int]:
        """Added tokens that are text, such as ``<think>`` or a row of blanks."""
        added = (token["content"] for token in self.definition.added_tokens)
        return {name: self._vocabulary[name] for name in added if name not in self.special_tokens}

    @cached_property
    def _plain_names(self) -> re.Pattern[str]:
        names = sorted(self._plain_added_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    # -- which engine ------------------------------------------------------------------------------

    def _merge_order(self) -> MergeOrder | None:
        model = self.definition.content["model"]
        if model.get("unk_token") or model.get("byte_fallback"):
            return None
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return None
        rules = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        return merge_order(
            model["vocab"], [(a, b) for a, b in rules], bool(model.get("ignore_merges"))
        )

    def _fastest(self) -> tuple[BytePairCore | None, str]:
        """tiktoken's core, or None; and what it runs on."""
        slow = "the library tokenizers, several times slower than tiktoken: "
        if not self._is_byte_level:
            return None, slow + "it is no byte-level BPE"
        expression = split_expression(self.definition.content.get("pre_tokenizer"))
        if expression is None or not self._cuts_alike():
            return None, slow + "it cuts or changes texts in a way that tiktoken does not offer"
        if self._order is None:
            return None, slow + "its merge rules are not in the order of ranks"
        order, vocabulary = self._order, self.definition.content["model"]["vocab"]
        without_id = len(order.bytes_without_token)
        spelled = [*order.bytes_without_token, *order.tokens, *order.whole_words]
        tokens = [unspell(token) or b"" for token in spelled]
        ids = np.array([vocabulary.get(token, 0) for token in spelled], self.dtype)
        core = BytePairCore(tokens, ids, without_id, expression)
        self._core = core
        for text in (*SAMPLE, "".join(SAMPLE)):
            found = self._encode_by_core(text)
            if found is not None and not np.array_equal(found, self._encode_by_library(text)):
                return None, slow + "tiktoken gives other ids on a sample of text"
        return core, "tiktoken"

    def _cuts_alike(self) -> bool:
        """Whether the normalizer and the added tokens are as :meth:`_encode_by_core` has them."""
        added = self.definition.added_tokens
        plain = [token for token in added if token["content"] in self._plain_added_tokens]
        if any(t.get(flag) for t in plain for flag in ("lstrip", "rstrip", "single_word")):
            return False
        if not self._normalizes:
            return len({bool(token.get("normalized")) for token in plain}) < 2
        normalizer = self.definition.content["normalizer"]
        return normalizer == {"type": "NFC"} and not any(t.get("normalized") for t in plain)

    # -- decoding and telling apart ----------------------------------------------------------------

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each id; special tokens and ids without a token stand for none."""
        found = [b""] * self.vocab_size
        added = {token["content"] for token in self.definition.added_tokens}
        for name, token in self._vocabulary.items():
            if name not in self.special_tokens:
                found[token] = name.encode() if name in added else self._bytes_of(name)
        return found

    def _bytes_of(self, token: str) -> bytes:
        if self._is_byte_level:
            spelled = unspell(token)
            return whole_characters(token).encode() if spelled is None else spelled
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return whole_characters(token.replace(_BLANK_MARK, " ")).encode()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the ids of a text.

        What is proved to run by ranks is told by its ranks: its merge rules follow from them.
        """
        content, model = self.definition.content, self.definition.content["model"]
        order = self._order
        rules = [order.tokens, order.whole_words] if order else [model.get("merges"), model]
        facts = [
            sorted(self._vocabulary.items()),
            rules,
            _without_defaults(content.get("normalizer")),
            _without_defaults(content.get("pre_tokenizer")),
            sorted(self.special_tokens.items()),
            sorted(self._plain_added_tokens.items()),
            self.eot_token,
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return _GPT2_FINGERPRINT if digest == _GPT2_DIGEST else digest

    def files(self) -> dict[str, bytes]:
        """``tokenizer.json`` and ``tokenizer_config.json``; ``generation_config.json``, where texts
        end at several tokens.
        """
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.definition.settings,
            "eos_token": self.end_of_text,
            "name_or_path": self.name,
        }
        files = {
            TOKENIZER_FILE: serialized(self._content_with_bos()),
            SETTINGS_FILE: serialized(settings),
        }
        ends = [self.eot_token, *sorted(self.end_tokens - {self.eot_token})]
        if len(ends) > 1:
            files[GENERATION_FILE] = serialized({"eos_token_id": ends})
        return files

    def _content_with_bos(self) -> dict[str, Any]:
        """``tokenizer.json``, whose post-processor puts the BOS before a text, or none:
        transformers 5 reads no ``add_bos_token`` beside it.
        """
        content = self.definition.content
        wanted = self.first_token if self.adds_bos else None
        if wanted == self._first_by_file:
            return content
        kept = _without_special_tokens(content.get("post_processor"))
        if wanted is None:
            return {**content, "post_processor": kept}
        name = self._library.id_to_token(wanted)
        assert name is not None
        first = begin_with(name, wanted)
        both = {"type": "Sequence", "processors": [kept, first]}
        return {**content, "post_processor": first if kept is None else both}


def _without_special_tokens(processor: Any) -> Any:
    """A post-processor without its parts that put tokens before and after a text; None: no part is
    left.
    """
    if not isinstance(processor, dict) or processor.get("type") in _TEMPLATES:
        return None
    if processor.get("type") != "Sequence":
        return processor
    parts = [_without_special_tokens(part) for part in processor["processors"]]
    kept = [part for part in parts if part is not None]
    return {**processor, "processors": kept} if kept else None


def _library_of(definition: TokenizerDefinition, end: str) -> tokenizers.Tokenizer:
    """The library's tokenizer, which takes the names of special tokens for text, that of ``end``
    too where the file does not call it special.
    """
    model = definition.content["model"]
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind not in ("BPE", "Unigram"):
        raise DataError(
            f"{definition.where} is of the kind {kind!r:.40}; texts come back from the ids of BPE "
            "and Unigram alone"
        )
    model.update({"dropout": None} if kind == "BPE" else {})
    added = [
        {**token, "special": True} if token["content"] == end else token
        for token in definition.added_tokens
    ]
    plain = {**definition.content, "added_tokens": added, "truncation": None, "padding": None}
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        newer = f", or newer than the library tokenizers {tokenizers.__version__}"
        reason = _PLACE_IN_JSON.sub("", str(error)[:200])  # of what is made here, not of the file
        raise DataError(
            f"{definition.where} is damaged{'' if definition.is_gguf else newer}: {reason}"
        ) from None
    library.encode_special_tokens = True
    return library


def _is_byte_level(definition: TokenizerDefinition) -> bool:
    """Whether tokens are spelled in the byte alphabet; else blanks are marks, as SentencePiece has
    it.
    """
    content = definition.content
    kinds = _types(content.get("pre_tokenizer")) | _types(content.get("decoder"))
    if "ByteLevel" in kinds and content["model"].get("type") != "Unigram":
        return True
    if kinds & {"Metaspace", "ByteFallback"} or _BLANK_MARK in json.dumps(
        content.get("decoder"), ensure_ascii=False
    ):
        return False
    raise DataError(
        f"{definition.where} is of an unknown kind: neither byte-level nor with marks for blanks, "
        "and so texts do not come back from its ids"
    )


def _without_first_blank(part: Any) -> Any:
    """A pre-tokenizer that does not know where a text begins."""
    if isinstance(part, dict):
        changed = {key: _without_first_blank(value) for key, value in part.items()}
        is_first = changed.get("type") == "Metaspace" and changed.get("prepend_scheme") == "first"
        return changed | ({"prepend_scheme": "never"} if is_first else {})
    return list(map(_without_first_blank, part)) if isinstance(part, list) else part


def _types(part: Any) -> set[str]:
    """The types of a part and of all within it."""
    if isinstance(part, dict):
        own = {part["type"]} if isinstance(part.get("type"), str) else set()
        return own.union(*map(_types, part.values()))
    return set().union(*map(_types, part)) if isinstance(part, list) else set()


def _without_defaults(part: Any) -> Any:
    """A part without what does not change ids, and without values that mean what their absence
    means: files of several versions of the library have more or fewer of them.
    """
    if isinstance(part, Mapping):
        return {
            key: _without_defaults(value)
            for key, value in part.items()
            if key != "trim_offsets" and value not in (None, key == "use_regex")
        }
    return [_without_defaults(item) for item in part] if isinstance(part, list) else part


_unknown: re.Pattern[str] | None = None


def _unknown_to_python() -> re.Pattern[str]:
    """Characters that Python's Unicode may not know the normal form of."""
    global _unknown
    if _unknown is None:
        characters = map(chr, range(0x10000))
        unassigned = "".join(re.escape(c) for c in characters if unicodedata.category(c) == "Cn")
        _unknown = re.compile(f"[{unassigned}\U00010000-\U0010ffff]")
    return _unknown
