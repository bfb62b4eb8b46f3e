"""The tokenizer goes with its shards, and no run takes those of another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaegpt.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megaegpt.data.preprocess.corpus import PreprocessOptions, preprocess
from megaegpt.data.preprocess.encode import EncodeOptions
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import save_tokenizer
from megaegpt.data.tokens.corpus_manifest import Manifest
from megaegpt.data.tokens.shard_tokenizer import check_same_tokenizer, tokenizer_of_shards
from megaegpt.data.tokens.shards import Shard
from megaegpt.errors import ConfigError, DataError
from megaegpt.training.run_data import PretrainingData
from tests.tiny.tokenizers import changed, trained_definition, trained_tokenizer

TEXT = "Tokens of a <|endoftext|> text, and 12  more of them.\n" * 30


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    save_tokenizer(trained_tokenizer(), folder)
    return folder


def shards_of(tmp_path: Path, vocabulary: Path | None, name: str = "shards") -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    encode = EncodeOptions(vocabulary=vocabulary and str(vocabulary))
    preprocess(PreprocessOptions(tmp_path / name, (str(tmp_path / "text.txt"),), encode=encode))
    return tmp_path / name / "train"


def data_of(train: Path, vocab_size: int, vocabulary: str | None = None) -> PretrainingData:
    return PretrainingData(
        RunConfig(
            model=ModelConfig(max_seq_len=16, vocab_size=vocab_size),
            data=DataConfig(train=(str(train),), vocabulary=vocabulary),
            training=TrainingConfig(steps=1),
        )
    )


def test_a_run_takes_the_tokenizer_beside_its_shards(tmp_path: Path, vocabulary: Path) -> None:
    train = shards_of(tmp_path, vocabulary)
    ours = trained_tokenizer()
    assert Shard(train).dtype == np.uint16
    assert ours.decode(Shard(train).document(0)) == TEXT + "<|endoftext|>"
    named = Manifest.load(train.parent).tokenizer
    assert named == {
        "name": "pages",
        "fingerprint": ours.fingerprint,
        "vocab_size": 700,
        "eot_token": 0,
    }
    assert data_of(train, 700).tokenizer.fingerprint == ours.fingerprint
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size=699 .* tokenizer pages: set it to 700"
    ):
        data_of(train, 699)


def test_a_run_refuses_shards_of_another_tokenizer(tmp_path: Path, vocabulary: Path) -> None:
    gpt2 = shards_of(tmp_path, None, "gpt2")
    assert not (gpt2.parent / "tokenizer").exists()
    with pytest.raises(
        DataError, match=r"gpt2 were made with the tokenizer gpt2 .* not with pages"
    ):
        data_of(gpt2, 50257, str(vocabulary))
    ours = shards_of(tmp_path, vocabulary)
    check_same_tokenizer([str(ours)], trained_tokenizer())
    with pytest.raises(DataError, match=r"with the tokenizer pages .* not with gpt2"):
        check_same_tokenizer([str(gpt2), str(ours)], Tokenizer.load())


def test_shards_made_again_with_gpt2_have_no_files_of_another_tokenizer(
    tmp_path: Path, vocabulary: Path
) -> None:
    train = shards_of(tmp_path, vocabulary)
    encode = EncodeOptions()
    text = str(tmp_path / "text.txt")
    preprocess(PreprocessOptions(train.parent, (text,), encode=encode, overwrite=True))
    assert tokenizer_of_shards([str(train)], None).name == "gpt2"


@pytest.mark.parametrize(("size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_shards_are_int32_from_65500_ids_on(size: int, dtype: type, tmp_path: Path) -> None:
    added = trained_definition().content["added_tokens"]
    last = {**added[0], "id": size - 1, "content": "<last>"}
    folder = tmp_path / "large"
    folder.mkdir()
    large = HuggingFaceTokenizer(changed(added_tokens=[*added, last]))
    save_tokenizer(large, folder)
    train = shards_of(tmp_path, folder)
    assert (large.vocab_size, large.dtype, Shard(train).dtype) == (size, dtype, dtype)
    assert large.decode(Shard(train).document(0)[:-1]) == TEXT
