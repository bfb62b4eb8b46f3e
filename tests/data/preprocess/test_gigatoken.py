"""The fast backend gives tiktoken's ids, is checked on every run, and stays small."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaegpt.data.preprocess import gigatoken
from megaegpt.data.preprocess.corpus import PreprocessOptions, preprocess
from megaegpt.data.preprocess.encode import EncodeOptions
from megaegpt.data.preprocess.gigatoken import GigatokenEncoder
from megaegpt.data.readers.inputs import open_bytes
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.errors import DataError
from tests.tiny.tokenizers import changed, trained_definition, trained_tokenizer

pytest.importorskip("gigatoken", reason="pip install gigatoken==0.10.0 to test the fast backend")

TOKENIZER = Tokenizer.load()
ENCODER = GigatokenEncoder(TOKENIZER)

# Contractions, digits of other scripts, combining marks, joiners, exotic blanks and line ends.
PIECES = [
    *[
        "'s",
        "'S",
        "'ll",
        "don't",
        "I'VE",
        "<|endoftext|>",
        "<|",
        "|>",
        "½",
        "²",
        "٣",
        "Ⅳ",
        "1234567",
    ],
    *["\u0301", "e\u0301", "\u200d", "\u200b", "\ufeff", "\u00a0", "\u2003", "\u3000", "\u2028"],
    *["\u0085", "\x0b", "\x0c", "\x1c", "\x00", "\r\n", "\r", "\n\n", "\t", "  ", " ", "   \n  "],
    *[
        "👩‍👩‍👧",
        "🇩🇪",
        "ﬁ",
        "ß",
        "İ",
        "\u0131",
        "Σ",
        "日本",
        "한",
        "\u0627",
        "א",
        "ก็",
        "\U0010ffff",
        "\ue000",
    ],
    *["a", "B", "_", "-", "...", "!?", "€", "\u0378", "\U000e0001", "\u2160", "\u0660", "\u1369"],
]


def assert_same(texts: list[str]) -> None:
    tokens, lengths = ENCODER.encode_batch(texts)
    expected, expected_lengths = TOKENIZER.encode_batch(texts)
    assert tokens.dtype == np.uint16
    assert np.array_equal(lengths, expected_lengths)
    assert np.array_equal(tokens, expected)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=4))
def test_any_text_has_tiktokens_ids(texts: list[str]) -> None:
    assert_same(texts)


def test_adversarial_mixtures_have_tiktokens_ids() -> None:
    source = random.Random(1)
    assert_same(["".join(source.choices(PIECES, k=12)) for _ in range(20_000)])


def test_every_assigned_character_has_tiktokens_ids() -> None:
    """Alone, after a letter, a digit and a blank: the classes of the pattern meet everywhere."""
    planes = [range(0xD800), range(0xE000, 0x20000), range(0xE0000, 0xE0200)]
    characters = [chr(code) for plane in planes for code in plane]
    assert_same(["".join(f"a{c} {c}1{c}" for c in characters[n::97]) for n in range(97)])


def all_texts(folder: Path) -> Iterator[str]:
    """Every document below the folder of real corpora, in whatever form it lies there."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".txt", ".json", ".md"):
            yield path.read_text(encoding="utf-8-sig")
        elif path.suffix in (".zst", ".bz2"):
            with open_bytes(path) as file:
                yield from io.TextIOWrapper(file, "utf-8")


def test_real_corpora_have_tiktokens_ids(data_dir: Path) -> None:
    """A piece of every text, another one in each; all of them with MEGAEGPT_ALL_TEXTS=1."""
    pieces = []
    for number, text in enumerate(all_texts(data_dir)):
        if os.environ.get("MEGAEGPT_ALL_TEXTS"):
            assert_same([text])
        elif len(text) > 200:
            start = number * 7919 % len(text)
            pieces.append(text[start : start + 20_000])
    assert_same(pieces)


def test_shards_are_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("War and <|endoftext|> peace.\n\n" * 100)
    for backend in ("tiktoken", "gigatoken"):
        encode = EncodeOptions(backend=backend)  # type: ignore[arg-type]
        preprocess(PreprocessOptions(tmp_path / backend, (str(tmp_path / "a.txt"),), encode=encode))
    for name in ("train.bin", "train.idx", "manifest.json"):
        first, second = ((tmp_path / backend / name) for backend in ("tiktoken", "gigatoken"))
        assert first.read_bytes() == second.read_bytes()


def test_a_difference_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def encode(self, text: str) -> np.ndarray:
            return np.array([0] * len(text), np.uint32)

    monkeypatch.setattr(gigatoken, "build_bpe_encoder", lambda _: Other())
    encoder = GigatokenEncoder(TOKENIZER)
    with pytest.raises(DataError, match="gigatoken and tiktoken disagree on the tokens of 'abc'"):
        encoder.encode_batch(["abc"])


def test_memory_is_bounded_on_text_without_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gigatoken, "MAX_GROWTH_BYTES", 24 << 20)
    built = []
    build = gigatoken.build_bpe_encoder
    monkeypatch.setattr(gigatoken, "build_bpe_encoder", lambda t: built.append(1) or build(t))
    encoder = GigatokenEncoder(TOKENIZER)
    before = gigatoken.resident_bytes()
    if before is None:
        pytest.skip("the size of a process cannot be read here")
    source = random.Random(1)
    for _ in range(12):
        words = ("".join(source.choices("abcdefghijklmnop", k=9)) for _ in range(60_000))
        encoder.encode_batch([" ".join(words)])
    assert len(built) > 1
    assert (gigatoken.resident_bytes() or 0) - before < 96 << 20


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken.gigatoken_rs", None)
    with pytest.raises(DataError, match="pip install gigatoken"):
        GigatokenEncoder(TOKENIZER)


def test_another_byte_level_bpe_has_tiktokens_ids() -> None:
    tokenizer = trained_tokenizer()
    encoder = GigatokenEncoder(tokenizer)
    source = random.Random(2)
    texts = ["".join(source.choices(PIECES, k=12)) for _ in range(2000)]
    for found, wanted in zip(
        encoder.encode_batch(texts), tokenizer.encode_batch(texts), strict=True
    ):
        assert np.array_equal(found, wanted)


def test_a_tokenizer_without_added_tokens_has_tiktokens_ids() -> None:
    definition = changed()
    del definition.content["added_tokens"]
    tokenizer = HuggingFaceTokenizer(definition)
    text = "Pages of War and Peace, 1812"
    found, _ = GigatokenEncoder(tokenizer).encode_batch([text])
    assert found.tolist() == tokenizer.encode(text)


def test_a_vocabulary_that_it_cannot_run_is_refused_in_a_line() -> None:
    content = trained_definition().content["model"]
    without = {name: number for name, number in content["vocab"].items() if name != "Ā"}
    tokenizer = HuggingFaceTokenizer(changed(model={"vocab": without}))
    with pytest.raises(DataError, match=r"gigatoken cannot run the tokenizer pages .*single-byte"):
        GigatokenEncoder(tokenizer)
