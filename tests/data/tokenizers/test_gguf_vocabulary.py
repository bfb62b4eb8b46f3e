"""The tokenizer in a GGUF file, and what else may be in one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megaegpt.data.tokenizers.gguf_vocabulary import read_gguf_definition
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
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
    writer.add_token_list(tokens)
    writer.add_token_merges(changes.get("merges", [" ".join(rule) for rule in content["merges"]]))
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_eos_token_id(changes.get("eos", 0))
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
    with pytest.raises(DataError, match=r"a\.gguf is damaged"):
        load_tokenizer(write(file, "gpt-2", merges=["nothing"]))
    content = write(file, "gpt-2").read_bytes()
    for damaged in (content[: len(content) // 2], b"GGUF", b"", b"something else"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.gguf is damaged or no GGUF file"):
            load_tokenizer(file)


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DataError, match="pip install gguf"):
        read_gguf_definition(tmp_path / "a.gguf")
