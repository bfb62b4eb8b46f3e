"""The tokenizer in a GGUF file, and what else may be in one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from megaegpt.data.tokenizers.bpe_training import train_byte_level_bpe
from megaegpt.data.tokenizers.definition import byte_level
from megaegpt.data.tokenizers.gguf_vocabulary import gguf_vocabulary, read_gguf_definition
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.split_pattern import LLAMA3_SPLIT, QWEN2_SPLIT
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer
from megaegpt.errors import DataError
from tests.tiny.tokenizers import changed, trained_definition, trained_tokenizer

TEXT = "Shards,\n\n  tokens and   12 words <|im_start|>"


def write(file: Path, pre: str, model: str = "gpt2", **changes: Any) -> Path:
    gguf = pytest.importorskip("gguf", reason="pip install gguf to read tokenizers of GGUF files")
    content = trained_definition().content["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(changes.get("tokens", tokens))
    writer.add_token_merges(changes.get("merges", [" ".join(rule) for rule in content["merges"]]))
    writer.add_token_types(changes.get("types", [3, 3] + [1] * (len(tokens) - 2)))
    if (end := changes.get("eos", 0)) is not None:
        writer.add_eos_token_id(end)
    if "bos" in changes:
        writer.add_bos_token_id(changes["bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_the_tokenizer_of_a_file_is_the_one_that_was_written(tmp_path: Path) -> None:
    found, ours = load_tokenizer(write(tmp_path / "a.gguf", "gpt-2")), trained_tokenizer()
    assert found.encode(TEXT) == ours.encode(TEXT)
    assert (found.name, found.eot_token, found.runs_on) == ("Tiny", 0, "tiktoken")
    assert found.special_tokens == ours.special_tokens
    assert found.fingerprint == ours.fingerprint


def test_smollms_rule_cuts_each_digit_by_itself(tmp_path: Path) -> None:
    first = {"type": "Digits", "individual_digits": True}
    members = [first, trained_definition().content["pre_tokenizer"]]
    wanted = HuggingFaceTokenizer(
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": members})
    )
    found = load_tokenizer(write(tmp_path / "a.gguf", "smollm"))
    assert found.encode(TEXT) == wanted.encode(TEXT) != trained_tokenizer().encode(TEXT)
    assert found.fingerprint == wanted.fingerprint


def test_other_kinds_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    with pytest.raises(DataError, match=r"a\.gguf holds the tokenizer 'llama'"):
        load_tokenizer(write(file, "default", model="llama"))
    with pytest.raises(DataError, match="cuts texts by the unknown rule 'new-rule'"):
        load_tokenizer(write(file, "new-rule"))
    with pytest.raises(DataError, match=r"a\.gguf is damaged: [^0-9]*$"):
        load_tokenizer(write(file, "gpt-2", merges=["nothing"]))
    names = {"tokens": ["a", "b", "c"], "merges": ["a b"], "types": [1, 1, 1], "eos": None}
    with pytest.raises(DataError, match=r"no token ends a document: give the folder of the model"):
        load_tokenizer(write(file, "gpt-2", **names))
    content = write(file, "gpt-2").read_bytes()
    for damaged in (content[: len(content) // 2], b"GGUF", b"", b"something else"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.gguf is damaged or no GGUF file"):
            load_tokenizer(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a", "b", "a"], "types": [1, 1, 1]}, "its token 'a' is there twice"),
        ({"types": [3, 3, 1]}, r"700 tokens have 3 types"),
        ({"types": ["x"]}, "token_type is damaged"),
        ({"tokens": [1, 2]}, "tokens is damaged"),
        ({"merges": [1, 2]}, "merges is damaged"),
        ({"eos": 700}, "its eos_token_id 700 is none of its 700 tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_list_that_is_not_of_its_tokens_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.gguf.*{message}"):
        load_tokenizer(write(tmp_path / "a.gguf", "gpt-2", **changes))


# -- writing --------------------------------------------------------------------------------------


def _split(expression: str) -> dict[str, Any]:
    """A pre-tokenizer that cuts texts by an expression."""
    cut = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    return {
        "type": "Sequence",
        "pretokenizers": [{**cut, "invert": False}, byte_level(False, False)],
    }


DIGITS = {"type": "Digits", "individual_digits": True}
RULES = {
    "gpt-2": {},
    "smollm": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, byte_level()]}},
    "llama-bpe": {"pre_tokenizer": _split(LLAMA3_SPLIT), "model": {"ignore_merges": True}},
    "qwen2": {"pre_tokenizer": _split(QWEN2_SPLIT), "normalizer": {"type": "NFC"}},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_tokenizer_is_written_in_the_words_of_llama_cpp(tmp_path: Path, rule: str) -> None:
    """Read again it is the same, with a model of more rows too."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf to read tokenizers of GGUF files")
    tokenizer = HuggingFaceTokenizer(changed(**RULES[rule]))
    found = gguf_vocabulary(tokenizer, 710)
    assert found is not None
    assert found["tokenizer.ggml.pre"] == rule
    assert found["tokenizer.ggml.tokens"][699:702] == [
        *found["tokenizer.ggml.tokens"][699:700],
        "[PAD700]",
        "[PAD701]",
    ]
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert found["tokenizer.ggml.token_type"][-10:] == [5] * 10
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, value in found.items():
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        kinds.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    again = load_tokenizer(tmp_path / "a.gguf")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.eot_token, again.bos_token, again.adds_bos) == (0, 0, False)


def test_all_ends_of_texts_are_written() -> None:
    """Each by the key that it has in Llama 3.1's files."""
    vocabulary = trained_definition().vocabulary
    ids = [vocabulary["<|im_start|>"], vocabulary["A"]]
    for ends in (ids, ids[:1]):
        definition = dataclasses.replace(changed(), ends=tuple(ends))
        found = gguf_vocabulary(HuggingFaceTokenizer(definition), 700)
        assert found is not None
        keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
        assert [found.get(key) for key in keys] == [0, *ends, None][:3]


def test_the_end_of_a_message_is_not_taken_for_that_of_a_turn(tmp_path: Path) -> None:
    texts = ["hello hello"]
    definition = train_byte_level_bpe(texts, "ends", 270, ["<|eom_id|>", "<|eot_id|>"])
    ends = tuple(definition.vocabulary[name] for name in ("<|eom_id|>", "<|eot_id|>"))
    tokenizer = HuggingFaceTokenizer(dataclasses.replace(definition, ends=ends))
    found = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    assert found is not None
    assert (found["tokenizer.ggml.eom_token_id"], found["tokenizer.ggml.eot_token_id"]) == ends


def test_gpt2s_own_tokenizer_is_written_too() -> None:
    found = gguf_vocabulary(load_tokenizer(), 50257)
    assert found is not None
    assert len(found["tokenizer.ggml.merges"]) == 50000
    assert found["tokenizer.ggml.eos_token_id"] == 50256


def test_a_tokenizer_that_the_keys_do_not_have_is_not_written() -> None:
    """A rule without a name there, a normalizer, fewer rows than tokens."""
    assert (
        gguf_vocabulary(HuggingFaceTokenizer(changed(pre_tokenizer=_split(r"\p{L}+|."))), 700)
        is None
    )
    assert gguf_vocabulary(HuggingFaceTokenizer(changed(normalizer={"type": "NFD"})), 700) is None
    assert gguf_vocabulary(trained_tokenizer(), 699) is None


@pytest.mark.parametrize(
    ("rule", "like_llama3"),
    [
        *((rule, True) for rule in ("llama-bpe", "falcon-h1", "pixtral", "lfm2", "tekken")),
        *((rule, False) for rule in ("dbrx", "smaug-bpe", "qwen2", "gpt-4o", "gpt-2", "smollm")),
    ],
)
def test_what_a_rule_implies_where_no_key_says_it_is_as_in_llama_cpp(
    tmp_path: Path, rule: str, like_llama3: bool
) -> None:
    """A BOS before each text, and words that are tokens taken without merging: src/llama-vocab.cpp
    in llama-cpp-python 0.3.36 sets both for Llama 3's names, and neither for others of its
    expression.
    """
    file = write(tmp_path / "a.gguf", rule, bos=1)
    assert (read_gguf_definition(file).content["model"]["ignore_merges"]) is like_llama3
    found = load_tokenizer(file)
    assert (found.bos_token, found.adds_bos) == (1, like_llama3)


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DataError, match="pip install gguf"):
        read_gguf_definition(tmp_path / "a.gguf")
