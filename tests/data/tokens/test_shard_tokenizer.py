"""The tokenizer goes with its shards, and no run takes those of another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaegpt.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megaegpt.data.preprocess.corpus import PreprocessOptions, preprocess
from megaegpt.data.preprocess.encode import EncodeOptions
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokenizers import tokenizer_files
from megaegpt.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megaegpt.data.tokenizers.tokenizer_files import load_tokenizer, save_tokenizer
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


def shards_of(
    tmp_path: Path, vocabulary: Path | None, name: str = "shards", **options: Any
) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    encode = EncodeOptions(vocabulary=None if vocabulary is None else str(vocabulary))
    text = (str(tmp_path / "text.txt"),)
    preprocess(PreprocessOptions(tmp_path / name, text, encode=encode, **options))
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


def chatting(ends: tuple[int, ...] = (), **settings: Any) -> HuggingFaceTokenizer:
    """:func:`trained_tokenizer` with other files beside ``tokenizer.json``."""
    plain = trained_definition()
    together = {**plain.settings, **settings}
    return HuggingFaceTokenizer(dataclasses.replace(plain, settings=together, ends=ends))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_made_again_have_their_tokenizer_as_it_is_then(
    tmp_path: Path, vocabulary: Path
) -> None:
    beside = shards_of(tmp_path, vocabulary).parent / "tokenizer"
    plain, now = trained_tokenizer(), chatting((0, 2), chat_template="{{ messages }}")
    assert contents(beside) == plain.files()
    assert now.fingerprint == plain.fingerprint
    save_tokenizer(now, vocabulary)
    shards_of(tmp_path, vocabulary, overwrite=True)
    assert contents(beside) == now.files()
    (vocabulary / "generation_config.json").unlink()
    save_tokenizer(plain, vocabulary)
    (beside / "notes.txt").write_text("mine")
    shards_of(tmp_path, vocabulary, overwrite=True)
    assert contents(beside) == plain.files() | {"notes.txt": b"mine"}


def test_a_tokenizer_that_shards_are_made_with_stays_as_it_is(tmp_path: Path) -> None:
    """It may lie beside them in a form that is not the one of this program."""
    own = tmp_path / "shards" / "tokenizer"
    own.mkdir(parents=True)
    save_tokenizer(trained_tokenizer(), own)
    (own / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (own / "chat_template.jinja").write_text("{{ messages }}")
    before = contents(own)
    shards_of(tmp_path, own)
    assert contents(own) == before


def test_a_link_to_a_tokenizer_is_replaced_and_not_what_it_leads_to(
    tmp_path: Path, vocabulary: Path
) -> None:
    beside = shards_of(tmp_path, vocabulary).parent / "tokenizer"
    now = chatting(chat_template="{{ messages }}")
    for path in beside.iterdir():
        path.unlink()
    beside.rmdir()
    (tmp_path / "other").mkdir()
    save_tokenizer(now, tmp_path / "other")
    beside.symlink_to(tmp_path / "other")
    shards_of(tmp_path, vocabulary, overwrite=True)
    assert contents(beside) == trained_tokenizer().files()
    assert contents(tmp_path / "other") == now.files()
    beside.rename(tmp_path / "once")
    beside.symlink_to(tmp_path / "once")
    shards_of(tmp_path, None, overwrite=True)
    assert not beside.exists()
    assert contents(tmp_path / "once") == trained_tokenizer().files()


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("beside", ["nothing", "the same ids", "other ids"])
def test_shards_are_finished_after_a_kill_within_their_tokenizer(
    written: int, beside: str, tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end of text is one that the settings alone name: without them, it is another one."""
    if beside != "nothing":
        if beside == "the same ids":
            save_tokenizer(chatting(eos_token="<|im_start|>", chat_template="old"), vocabulary)
        shards_of(tmp_path, vocabulary)
    now = chatting((0, 2), eos_token="<|im_start|>")
    assert now.fingerprint != trained_tokenizer().fingerprint
    save_tokenizer(now, vocabulary)
    whole_file, files = tokenizer_files.whole_file, iter(range(3))

    def killed(path: Path) -> Any:
        if next(files) == written:
            raise KeyboardInterrupt
        return whole_file(path)

    monkeypatch.setattr(tokenizer_files, "whole_file", killed)
    with pytest.raises(KeyboardInterrupt):
        shards_of(tmp_path, vocabulary, overwrite=True)
    monkeypatch.undo()
    train = shards_of(tmp_path, vocabulary, overwrite=True)
    assert contents(train.parent / "tokenizer") == now.files()
    assert load_tokenizer(train.parent / "tokenizer").fingerprint == now.fingerprint


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
