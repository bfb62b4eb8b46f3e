"""The files of a tokenizer in Hugging Face's form, read and checked."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megaegpt.data.tokenizer import END_OF_TEXT, whole_characters
from megaegpt.errors import DataError
from megaegpt.json_files import conform, read_bytes, read_json

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
TOKENS_FILE, MERGES_FILE = "vocab.json", "merges.txt"
GENERATION_FILE = "generation_config.json"
_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_TOKENS_FILE, _ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Kinds of special tokens that ``tokenizer_config.json`` names, as chat templates know them."""
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names that end a document by themselves, where no file says which one does."""
_CUT_AS_GPT2 = "GPT2 CodeGen Roberta Bart Longformer LED Deberta Whisper".split()  # noqa: SIM905
"""Tokenizers of transformers that cut a text into words as GPT-2's does, and change none of it."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

_ANY_ID = 1 << 19
_LONGEST_ID = 9
_REMEDY = "download or copy it again"


@dataclass(frozen=True)
class TokenizerDefinition:
    """The contents of ``tokenizer.json`` and the files beside it.

    Attributes:
        name: for people and manifests.
        where: file, for messages.
        content: of ``tokenizer.json``.
        settings: of ``tokenizer_config.json``: names of special tokens, the chat template.
        ends: ids at which a model stops to write, by ``generation_config.json``; those that are no
            tokens do not count.
        is_gguf: ``where`` is a GGUF file, of whose metadata the other parts were made.
    """

    name: str
    where: str
    content: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    is_gguf: bool = False

    @property
    def vocabulary(self) -> dict[str, int]:
        """Tokens, as the file spells them, and their ids; added ones included.

        Raises:
            DataError: an id is out of range, or two tokens have one.
        """
        listed = self.content["model"].get("vocab")
        if isinstance(listed, list):  # a Unigram model has tokens and their scores
            where = f"{self.where}: its vocabulary"
            entries = conform(listed, list[list[Any]], where, remedy=_REMEDY)
            names = conform([entry[0] for entry in entries if entry], list[str], where)
            if len(names) < len(entries):
                raise DataError(f"{self.where} is damaged: a token is empty; {_REMEDY}")
            pairs = [(name, number) for number, name in enumerate(names)]
        elif isinstance(listed, dict):
            pairs = list(listed.items())
        else:
            raise DataError(f"{self.where} is damaged: its model has no vocabulary; {_REMEDY}")
        found = dict(pairs) | {token["content"]: token["id"] for token in self.added_tokens}
        # Some ids may be left out, but tables of all ids must fit into memory.
        most = max(2 * len(found), _ANY_ID)
        for name, token in found.items():
            if type(token) is not int or not 0 <= token < most:
                raise DataError(
                    f"{self.where} is damaged: its token {name!r:.40} has the id {token!r:.40}, "
                    f"and there are {len(found):,} tokens; {_REMEDY}"
                )
        if len(set(found.values())) < len(found):
            self._refuse_an_id_of_two(found)
        return found

    def _refuse_an_id_of_two(self, found: Mapping[str, int]) -> NoReturn:
        names: dict[int, str] = {}
        for name, token in found.items():
            if token in names:
                break
            names[token] = name
        raise DataError(
            f"{self.where} is damaged: its tokens {names[token]!r:.40} and {name!r:.40} both have "
            f"the id {token}; {_REMEDY}"
        )

    @property
    def chat_template(self) -> str | None:
        """Jinja of the chat template; of several that have names, the one called ``default``."""
        found = self.settings.get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        return found if isinstance(found, str) else None

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that are found in a text as a whole, special ones among them: by their entry, or
        because the settings name them.
        """
        found = self.content.get("added_tokens")
        where = f"{self.where}: added_tokens"
        added = conform([] if found is None else found, list[Any], where, remedy=_REMEDY)
        for token in added:
            if (
                not isinstance(token, dict)
                or not isinstance(token.get("content"), str)
                or not token["content"]
            ):
                raise DataError(f"{self.where} is damaged: an added token has no text; {_REMEDY}")
            if type(token.get("id")) is not int:
                name = token["content"]
                raise DataError(f"{self.where} is damaged: {name!r:.40} has no id; {_REMEDY}")
        named = {token_name(self.settings.get(f"{kind}_token")) for kind in NAMED}
        return [{**t, "special": True} if t["content"] in named else t for t in added]

    def end_of_text(self, vocabulary: Mapping[str, int]) -> str:
        """The name of the token that ends a document.

        Raises:
            DataError: none is named, or what is named is no token.
        """
        named = token_name(self.settings.get("eos_token"))
        if named is None:
            named = next((name for name in _ENDS if name in vocabulary), None)
        if named is None:
            advice = f"name one as eos_token in {SETTINGS_FILE} beside it"
            if self.is_gguf:
                advice = f"give the folder of the model's {TOKENIZER_FILE} instead"
            raise DataError(f"{self.where}: no token ends a document: {advice}")
        if named not in vocabulary:
            raise DataError(f"{self.where}: its eos_token {named!r:.40} is no token of it")
        return named


def token_name(value: Any) -> str | None:
    """The name in a setting such as ``eos_token``: a text, or an object that holds it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def read_definition(place: Path) -> TokenizerDefinition:
    """Of a folder with ``tokenizer.json``, or of the file.

    Raises:
        DataError: it is missing, or a file is damaged.
    """
    file = place / TOKENIZER_FILE if place.is_dir() else place
    folder = file.parent
    content = read_json(file, dict[str, Any], remedy=_REMEDY)
    if not isinstance(content.get("model"), dict):
        raise DataError(f"{file} is damaged: it has no model, as every {TOKENIZER_FILE} has one")
    settings = _read_if_there(folder / SETTINGS_FILE)
    content |= _added_tokens_beside(folder, settings, content, file)
    if token_name(settings.get("eos_token")) is None:
        settings |= _end_from_other_files(folder, content)
    settings |= _chat_template_beside(folder)
    name = settings.get("name_or_path") or folder.resolve().name
    return TokenizerDefinition(
        Path(str(name)).name, str(file), content, settings, _ends_of_texts(folder)
    )


def _added_tokens_beside(
    folder: Path, settings: Mapping[str, Any], content: dict[str, Any], file: Path
) -> dict[str, Any]:
    """``added_tokens`` with those that the files beside ``tokenizer.json`` alone have, in the order
    of their ids; as in transformers, their ids follow those that are taken.
    """
    listed = sorted(_listed_tokens(folder, settings).values(), key=lambda token: token["id"])
    if not listed:
        return {}
    definition = TokenizerDefinition("", str(file), content)
    added, ids = content.get("added_tokens") or [], definition.vocabulary
    known = {token["content"] for token in definition.added_tokens}
    free = itertools.count(max(ids.values(), default=-1) + 1)
    more = [
        {**token, "id": ids[name] if (name := token["content"]) in ids else next(free)}
        for token in listed
        if token["content"] not in known
    ]
    return {"added_tokens": [*added, *more]}


def read_older_definition(folder: Path) -> TokenizerDefinition:
    """Of a folder with ``vocab.json`` and ``merges.txt``, GPT-2's form.

    Raises:
        DataError: a file is missing or damaged, or the tokenizer cuts words in a way of its own.
    """
    file, merges = folder / TOKENS_FILE, folder / MERGES_FILE
    vocabulary = read_json(file, dict[str, int], remedy=_REMEDY)
    try:
        lines = read_bytes(merges).decode().replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {merges}: {error}") from None
    rules = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(rule) != 2 for rule in rules):
        raise DataError(f"{merges} is damaged: a rule is not two tokens; {_REMEDY}")
    settings = _read_if_there(folder / SETTINGS_FILE)
    _check_words(settings.get("tokenizer_class"), file)
    added = _older_added_tokens(folder, settings, vocabulary)
    prefix = bool(settings.get("add_prefix_space"))
    content = byte_level_content(vocabulary, rules, added, byte_level(prefix))
    if token_name(settings.get("eos_token")) is None:
        settings |= _end_from_other_files(folder, content)
    settings |= _chat_template_beside(folder)
    name = settings.get("name_or_path") or folder.resolve().name
    return TokenizerDefinition(
        Path(str(name)).name, str(file), content, settings, _ends_of_texts(folder)
    )


def _check_words(kind: Any, file: Path) -> None:
    """Refuse a ``tokenizer_class`` whose words are not GPT-2's: no file says what they are."""
    if not isinstance(kind, str):
        return
    if kind.removesuffix("Fast").removesuffix("Tokenizer") not in _CUT_AS_GPT2:
        raise DataError(
            f"{file} is of a {kind!r:.40}, and how that cuts words is in {TOKENIZER_FILE} alone: "
            "save it again with transformers, which writes one"
        )


def _older_added_tokens(
    folder: Path, settings: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> list[dict[str, Any]]:
    """``added_tokens`` by id: those that are listed, and special tokens of the vocabulary, which
    are not.
    """
    special = _special_names(folder, settings)
    added = {n: added_token(vocabulary[n], n) for n in special if n in vocabulary}
    added |= _listed_tokens(folder, settings)
    return sorted(added.values(), key=lambda token: token["id"])


def _listed_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of ``added_tokens_decoder`` of the settings or, before there was one, of
    ``added_tokens.json``, by name.
    """
    added: dict[str, dict[str, Any]] = {}
    listed, file = settings.get("added_tokens_decoder"), folder / _ADDED_TOKENS_FILE
    if listed is None and not os.path.lexists(file):
        return added
    special = _special_names(folder, settings)
    if listed is not None:
        where = f"{folder / SETTINGS_FILE}: added_tokens_decoder"
        for key, entry in conform(listed, dict[str, dict[str, Any]], where, remedy=_REMEDY).items():
            name = token_name(entry)
            if not name or not key.isdecimal() or len(key) > _LONGEST_ID:
                raise DataError(f"{where} is damaged: {key!r:.40} is no token; {_REMEDY}")
            flags = {flag: bool(entry.get(flag)) for flag in _FLAGS}
            is_special = bool(entry.get("special")) or name in special
            added[name] = added_token(int(key), name, is_special) | flags
    else:
        for name, number in read_json(file, dict[str, int], remedy=_REMEDY).items():
            added[name] = added_token(number, name, name in special)
    return added


def _special_names(folder: Path, settings: Mapping[str, Any]) -> set[str]:
    """Of special tokens by the settings and the file for them alone."""
    values: list[Any] = [END_OF_TEXT]
    for said in (settings, _read_if_there(folder / _SPECIAL_TOKENS_FILE)):
        several = [said.get(key) for key in _MORE_SPECIAL]
        values += [value for more in several if isinstance(more, list) for value in more]
        values += [said.get(f"{kind}_token") for kind in NAMED]
    return {name for name in map(token_name, values) if name is not None}


def read_chat_template(folder: Path) -> str | None:
    """Jinja of the chat template in a folder, with a tokenizer or without; None: there is none.

    Raises:
        DataError: a file is damaged.
    """
    settings = _read_if_there(folder / SETTINGS_FILE) | _chat_template_beside(folder)
    return TokenizerDefinition(folder.name, str(folder), {}, settings).chat_template


def added_token(number: int, name: str, special: bool = True) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    flags = dict.fromkeys(_FLAGS, False)
    return {"id": number, "content": name, **flags, "special": special}


def byte_level(add_prefix_space: bool = False, use_regex: bool = True) -> dict[str, Any]:
    """The pre-tokenizer and the decoder ``ByteLevel``; with ``use_regex`` it cuts GPT-2's words."""
    flags = {"add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


def begin_with(name: str, number: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text."""

    def token(kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    first, second = ({"Sequence": {"id": "AB"[kind], "type_id": kind}} for kind in (0, 1))
    return {
        "type": "TemplateProcessing",
        "single": [token(0), first],
        "pair": [token(0), first, token(1), second],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def byte_level_content(
    vocabulary: Mapping[str, int],
    merges: list[list[str]],
    added_tokens: list[dict[str, Any]],
    pre_tokenizer: Mapping[str, Any],
    *,
    normalizer: Mapping[str, Any] | None = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """``tokenizer.json`` of a byte-level BPE."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


def _read_if_there(file: Path) -> dict[str, Any]:
    """Whatever has the name of the file is read: a link that leads nowhere is no missing file."""
    there = os.path.lexists(file)
    return read_json(file, dict[str, Any], remedy=_REMEDY) if there else {}


def _chat_template_beside(folder: Path) -> dict[str, Any]:
    """``chat_template`` of the file of its own, which goes before ``tokenizer_config.json``."""
    file = folder / _CHAT_TEMPLATE_FILE
    if not file.is_file():
        return {}
    try:
        return {"chat_template": read_bytes(file).decode()}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from None


def _end_from_other_files(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """``eos_token``, where ``tokenizer_config.json`` does not name it."""
    named = token_name(_read_if_there(folder / _SPECIAL_TOKENS_FILE).get("eos_token"))
    if named is not None:
        return {"eos_token": named}
    first = _ends_of_texts(folder)[:1]
    added = content.get("added_tokens")
    listed = added if isinstance(added, list) else []  # what it is instead, is said later
    names = [t.get("content") for t in listed if isinstance(t, dict) and t.get("id") in first]
    return {"eos_token": names[0]} if names else {}


def _ends_of_texts(folder: Path) -> tuple[int, ...]:
    """Ids in ``generation_config.json``, which names one or several."""
    ends = _read_if_there(folder / GENERATION_FILE).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return tuple(end for end in listed if type(end) is int)


def serialized(content: Mapping[str, Any]) -> bytes:
    """JSON as files have it; halves of surrogate pairs, which UTF-8 has not, are U+FFFD."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    return (whole_characters(text) + "\n").encode()
