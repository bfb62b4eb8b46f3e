"""cl100k_base and o200k_base from a file of ranks, without the network.

Their ranks are not on every machine; a small file stands in for them, and tiktoken's own
definitions say how words are cut.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megaegpt.data.tokenizers import tiktoken_encodings
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tiktoken_encodings import ENCODINGS, definition_of_ranks
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer, save_tokenizer
from megaegpt.errors import DataError
from tests.tiny.tokenizers import HARD_TEXT, trained_tokenizer

RANKS = [token for token in trained_tokenizer().token_bytes if token]
CONTENT = b"".join(base64.b64encode(token) + b" %d\n" % n for n, token in enumerate(RANKS))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small file is the published one."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    small = dataclasses.replace(ENCODINGS["cl100k_base"], sha256=digest)
    monkeypatch.setitem(tiktoken_encodings.ENCODINGS, "cl100k_base", small)


@pytest.mark.parametrize("name", ENCODINGS)
def test_words_special_tokens_and_checksum_are_tiktokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ranks(url: str, expected_hash: str) -> dict[bytes, int]:
        asked.append((url, expected_hash))
        return {token: rank for rank, token in enumerate(RANKS)}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", ranks)
    published = openai_public.ENCODING_CONSTRUCTORS[name]()
    theirs = tiktoken.Encoding(**published)
    ours = HuggingFaceTokenizer(definition_of_ranks(name, name, RANKS, ENCODINGS[name]))
    assert asked[0][1] == ENCODINGS[name].sha256
    assert ours.special_tokens == published["special_tokens"]
    assert (ours.runs_on, ours.vocab_size) == ("tiktoken", theirs.n_vocab)

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(st.text(), HARD_TEXT))
    def compare(text: str) -> None:
        assert ours.encode(text) == theirs.encode_ordinary(text)

    compare()


@pytest.mark.usefixtures("known")
def test_the_file_is_found_where_tiktoken_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"cl100k_base is not on this machine .*get_encoding"):
        load_tokenizer("cl100k_base")
    (tmp_path / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_bytes(CONTENT)
    found = load_tokenizer("cl100k_base")
    (tmp_path / "x.tiktoken").write_bytes(CONTENT)
    assert found.fingerprint == load_tokenizer(tmp_path / "x.tiktoken").fingerprint
    assert (found.name, found.eot_token, found.dtype.name) == ("cl100k_base", 100257, "int32")
    (tmp_path / "saved").mkdir()
    save_tokenizer(found, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == found.fingerprint


def test_ranks_of_an_unknown_encoding_and_damaged_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.tiktoken"
    file.write_bytes(CONTENT)
    with pytest.raises(DataError, match=r"x\.tiktoken is neither cl100k_base nor o200k_base"):
        load_tokenizer(file)
    for content in (b"!!! 0\n", b"YQ== x\n", b"YQ== 5\n", b"YQ==\n"):
        with pytest.raises(DataError, match=r"x\.tiktoken is damaged"):
            tiktoken_encodings.parse_ranks(content, file)
