"""No token that a model does not know gets out of shards, and no other tokenizer's bytes count."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megaegpt.config import DataConfig, EGPTConfig, ModelConfig, RunConfig, TrainingConfig
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens import token_ids
from megaegpt.data.tokens.corpus_manifest import Manifest, describe_tokenizer
from megaegpt.data.tokens.shards import ShardWriter
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.data.tokens.token_ids import check_ids, document_end, known_byte_lengths
from megaegpt.errors import ConfigError, DataError
from megaegpt.labels import IGNORE
from megaegpt.training.run_data import PretrainingData
from tests.data.corpora import write_shard

TOKENIZER = Tokenizer.load()


def with_manifest(folder: Path, tokens: list[int], tokenizer: dict[str, Any]) -> TokenStream:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / "train") as writer:
        writer.add_document(np.array(tokens))
        Manifest(tokenizer, {}, {}, {"train": [writer.finish()]}).save(folder)
    return TokenStream([str(folder / "train")])


def test_tokens_of_another_tokenizer_are_named(tmp_path: Path) -> None:
    good = write_shard(tmp_path / "good", [np.arange(100)])
    bad = write_shard(tmp_path / "bad", [np.array([1, 2, 50300, 3, 60000])])
    negative = write_shard(tmp_path / "negative", [np.array([1, -100])], np.int32)
    check_ids(TokenStream([good]), 50257)
    check_ids(TokenStream([bad]), 60001)
    with pytest.raises(DataError, match=r"bad\.bin holds id 50300 at token 2, outside .* 50257"):
        check_ids(TokenStream([good, bad]), 50257)
    with pytest.raises(DataError, match=r"negative\.bin holds id -100 at token 1"):
        check_ids(TokenStream([negative]), 50257)


def test_a_manifest_and_a_small_type_make_reading_needless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = with_manifest(tmp_path / "ours", [1, 2], describe_tokenizer(TOKENIZER))
    small = TokenStream([write_shard(tmp_path / "bytes", [np.array([1, 255])], np.uint8)])
    other = with_manifest(tmp_path / "other", [1, 60000], {"vocab_size": 65000})
    with pytest.raises(DataError, match="holds id 60000"):
        check_ids(other, 50257)
    monkeypatch.setattr(token_ids.Shard, "check_ids", lambda *_: pytest.fail("it was read"))
    for stream in (ours, small):
        check_ids(stream, 50257)
    check_ids(other, 65000)


def test_ranks_share_the_shards_and_miss_none(tmp_path: Path) -> None:
    prefixes = [
        write_shard(tmp_path / str(number), [np.array([number, 300 * (number == 4)])])
        for number in range(5)
    ]
    reports = 0
    for rank in range(3):
        try:
            check_ids(TokenStream(prefixes), 256, rank, 3)
        except DataError:
            reports += 1
    assert reports == 1


def test_more_than_a_start_may_read_is_held_against_the_vocabulary_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = TokenStream([write_shard(tmp_path / "s", [np.arange(300)])])
    monkeypatch.setattr(token_ids, "MAX_SCANNED_BYTES", 100)
    check_ids(stream, 256)
    rows = np.empty((1, 6), np.int64)
    stream.read_rows(np.array([250]), rows)
    with pytest.raises(DataError, match=r"s\.bin holds id 256 at token 256"):
        stream.read_rows(np.array([251]), rows)


def test_a_run_over_tokens_outside_its_vocabulary_does_not_start(tmp_path: Path) -> None:
    good = write_shard(tmp_path / "good", [np.arange(100)])
    bad = write_shard(tmp_path / "bad", [np.arange(50200, 50300)])
    for splits in ({"train": (bad,)}, {"train": (good,), "validation": (bad,)}):
        config = RunConfig(
            model=ModelConfig(max_seq_len=16),
            data=DataConfig(**splits),
            training=TrainingConfig(steps=1),
        )
        with pytest.raises(DataError, match=r"bad\.bin holds id 50257 at token 57"):
            PretrainingData(config)


def test_a_corpus_without_tokens_in_a_blend_is_the_one_that_is_named(tmp_path: Path) -> None:
    good = write_shard(tmp_path / "good", [np.arange(100)])
    empty = write_shard(tmp_path / "empty", [])
    for train in ((good, empty), (empty, good)):
        config = RunConfig(
            model=ModelConfig(max_seq_len=16),
            data=DataConfig(train=train, weights=(1.0, 1.0)),
            training=TrainingConfig(steps=1),
        )
        with pytest.raises(DataError, match="empty has no tokens: leave it and its weight out"):
            PretrainingData(config)


def test_bytes_of_tokens_are_known_for_the_tokenizer_of_the_shards_alone(tmp_path: Path) -> None:
    ours = with_manifest(tmp_path / "ours", [1, 2], describe_tokenizer(TOKENIZER))
    other = with_manifest(tmp_path / "other", [1, 2], {"fingerprint": "another"})
    foreign = TokenStream([write_shard(tmp_path / "foreign", [np.array([1, 2])])])
    for stream, vocab_size in [(ours, 50257), (foreign, 50257), (ours, 60000)]:
        lengths = known_byte_lengths(stream, TOKENIZER, vocab_size)
        assert lengths is TOKENIZER.token_byte_lengths
    for stream, vocab_size in [(other, 50257), (foreign, 60000)]:
        assert known_byte_lengths(stream, TOKENIZER, vocab_size) is None


def test_what_ends_a_document_is_known_from_the_shards_manifests(tmp_path: Path) -> None:
    ours = with_manifest(tmp_path / "ours", [1, 50256], describe_tokenizer(TOKENIZER))
    other = with_manifest(tmp_path / "other", [1, 2], {"eot_token": 2})
    foreign = TokenStream([write_shard(tmp_path / "foreign", [np.array([1, 50256])])])
    assert document_end(ours, TOKENIZER) == document_end(foreign, TOKENIZER) == 50256
    assert document_end(other, TOKENIZER) == 2
    both = TokenStream([*ours.prefixes, *other.prefixes])
    with pytest.raises(DataError, match=r"documents end with 50256 in .*, 2 in .*; set data\.mask"):
        document_end(both, TOKENIZER)
    silent = with_manifest(tmp_path / "silent", [1, 2], {"vocab_size": 3})
    with pytest.raises(DataError, match=r"silent/manifest\.json names no eot_token"):
        document_end(silent, TOKENIZER)


@pytest.mark.parametrize("place", ["train", "validation", "validation_sets"])
def test_shards_whose_documents_end_with_another_token_are_refused(
    tmp_path: Path, place: str
) -> None:
    for name, end in (("good", 9), ("bad", 3)):
        with_manifest(tmp_path / name, [1, 2, end] * 40, {"eot_token": end, "vocab_size": 10})
    good, bad = (str(tmp_path / name / "train") for name in ("good", "bad"))
    values = {"train": (good,)} | {place: ([f"further={bad}"] if "sets" in place else [bad])}
    config = RunConfig(
        model=ModelConfig(max_seq_len=16, document_end=9),
        data=DataConfig(**values),  # type: ignore[arg-type]
        training=TrainingConfig(steps=1),
    )
    with pytest.raises(ConfigError, match=r"document_end=9 .*/bad: its manifest\.json .* 3 does"):
        PretrainingData(config)
    PretrainingData(dataclasses.replace(config, data=DataConfig(train=(good,))))
    manifest = Manifest.load(tmp_path / "bad")
    dataclasses.replace(manifest, plan={"append_eod": False}).save(tmp_path / "bad")
    PretrainingData(config)


@pytest.mark.parametrize("kind", ["gpt", "egpt", "deepgpt"])
@pytest.mark.parametrize("weights", [(), (1.0, 1.0)])
def test_a_run_masks_what_follows_a_document_s_end_in_training_and_validation(
    tmp_path: Path, kind: Literal["gpt", "egpt", "deepgpt"], weights: tuple[float, ...]
) -> None:
    for name in ("a", "b", "held_out"):
        with_manifest(tmp_path / name, [1, 2, 9, 3] * 40, {"eot_token": 9, "vocab_size": 10})
    config = RunConfig(
        model=ModelConfig(kind=kind, max_seq_len=16, egpt=EGPTConfig(num_chunks=2, chunk_size=8)),
        data=DataConfig(
            train=(f"{tmp_path}/a/train", f"{tmp_path}/b/train"),
            weights=weights,
            validation=(f"{tmp_path}/held_out/train",),
        ),
        training=TrainingConfig(steps=1),
    )
    data = dataclasses.replace(config.data, mask_after_document_end=True)
    whole, masked = map(PretrainingData, (config, dataclasses.replace(config, data=data)))
    for unmasked, samples in (
        (whole.samples, masked.samples),
        (whole.validation, masked.validation),
    ):
        assert unmasked is not None
        assert samples is not None
        before, after = (s.batch(np.arange(4)) for s in (unmasked, samples))
        ends = before["tokens"] == 9
        assert ends.any()
        assert np.array_equal(after["targets"], np.where(ends, IGNORE, before["targets"]))
    model = dataclasses.replace(config.model, document_end=3)
    if kind == "gpt":  # then the token that attention starts anew after
        for manifest in tmp_path.glob("*/manifest.json"):
            manifest.unlink()
        both = PretrainingData(dataclasses.replace(config, data=data, model=model))
        batch = both.samples.batch(np.arange(4))
        assert np.array_equal(batch["targets"] == IGNORE, batch["tokens"] == 3)
