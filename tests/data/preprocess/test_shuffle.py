"""Documents in the order of a seed: each once, mixed over all shards, to the same bytes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaegpt.data.preprocess import shuffle
from megaegpt.data.preprocess.corpus import PreprocessOptions, Report, preprocess
from megaegpt.data.preprocess.shuffle import ShuffledDocuments
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.data.tokens.permutation import Permutation
from megaegpt.data.tokens.shards import Shard, ShardWriter
from megaegpt.data.tokens.stream import resolve_prefixes

TOKENIZER = Tokenizer.load()
TEXTS = [f"{number} " + "x " * (number % 7) for number in range(1000)]


@pytest.fixture(autouse=True)
def _load_the_vocabulary_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "load", lambda vocabulary=None: TOKENIZER)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(output: Path, corpus: Path, **options: Any) -> Report:
    return preprocess(PreprocessOptions(output, (str(corpus),), **options))


def documents(prefix: Path) -> list[list[int]]:
    shards = map(Shard, resolve_prefixes([str(prefix)]))
    return [s.document(n).tolist() for s in shards for n in range(s.num_documents)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("shards", [1, 3])
def test_each_split_is_the_permutation_of_its_documents(
    tmp_path: Path, corpus: Path, shards: int
) -> None:
    run(tmp_path / "ordered", corpus, validation_fraction=0.2)
    report = run(tmp_path / "out", corpus, validation_fraction=0.2, shards=shards, shuffle_seed=7)
    for number, split in enumerate(("train", "validation")):
        ordered = documents(tmp_path / "ordered" / split)
        order = Permutation(len(ordered), (7, number))(np.arange(len(ordered)))
        assert documents(tmp_path / "out" / split) == [ordered[place] for place in order]
    assert report.manifest.plan["shuffle_documents"] == 7
    report.manifest.verify(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 1 + 4 * shards


def test_a_sorted_corpus_is_mixed_and_another_seed_mixes_it_otherwise(
    tmp_path: Path, corpus: Path
) -> None:
    orders = []
    for seed in (0, 1):
        run(tmp_path / str(seed), corpus, shuffle_seed=seed)
        found = [TOKENIZER.decode(tokens) for tokens in documents(tmp_path / str(seed) / "train")]
        orders.append([int(text.split()[0]) for text in found])
    # Between independent orders of 1,000 the standard deviation of this is 1 / sqrt(999).
    for first, second in ((range(1000), orders[0]), (range(1000), orders[1]), orders):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(999)


def test_a_run_that_ends_between_shuffled_shards_encodes_nothing_again(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"shards": 3, "shuffle_seed": 3, "deduplicate": True}
    run(tmp_path / "expected", corpus, **options)
    finish, calls = ShardWriter.finish, iter(range(100))

    def finish_some(writer: ShardWriter, *arguments: Any) -> Any:
        if next(calls) == 4:  # three shards in order, one shuffled
            raise KeyboardInterrupt
        return finish(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "finish", finish_some)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", corpus, **options)
    monkeypatch.setattr(ShardWriter, "finish", finish)
    kept = (tmp_path / "out" / "train-00000-of-00003.bin").stat().st_ino
    assert run(tmp_path / "out", corpus, **options).meter.counts.documents == 0
    assert (tmp_path / "out" / "train-00000-of-00003.bin").stat().st_ino == kept
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_a_run_that_is_to_replace_a_corpus_goes_on_and_spares_it_until_then(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"shards": 2, "shuffle_seed": 3}
    run(tmp_path / "expected", corpus, **options)
    run(tmp_path / "out", corpus, shards=2)
    before = files_of(tmp_path / "out")
    finish, calls = ShardWriter.finish, iter(range(100))

    def finish_some(writer: ShardWriter, *arguments: Any) -> Any:
        if next(calls) == 1:  # the first in order
            raise KeyboardInterrupt
        return finish(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "finish", finish_some)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", corpus, overwrite=True, **options)
    monkeypatch.setattr(ShardWriter, "finish", finish)
    hidden = tmp_path / "out" / ".progress"
    kept = (hidden / "train-00000-of-00002.bin").stat().st_ino
    hidden.rename(tmp_path / "once")
    assert files_of(tmp_path / "out") == before
    (tmp_path / "once").rename(hidden)

    def finish_shuffled(writer: ShardWriter, *arguments: Any) -> Any:
        assert (hidden / "train-00000-of-00002.bin").stat().st_ino == kept
        return finish(writer, *arguments)

    monkeypatch.setattr(ShardWriter, "finish", finish_shuffled)
    run(tmp_path / "out", corpus, overwrite=True, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_a_shard_that_is_lost_is_not_made_of_what_was_to_replace_its_corpus(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "another"}\n')
    run(tmp_path / "out", corpus, shuffle_seed=1)
    before = files_of(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ShuffledDocuments, "write", None)
        with pytest.raises(TypeError):
            run(tmp_path / "out", other, shuffle_seed=1, overwrite=True)
    assert (tmp_path / "out" / ".progress" / "train.bin").exists()
    (tmp_path / "out" / "train.bin").unlink()
    run(tmp_path / "out", corpus, shuffle_seed=1)
    assert files_of(tmp_path / "out") == before


def test_pieces_of_any_size_give_the_same_shard_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(1).integers(0, 3000, size=2000)
    for number in range(2):
        with ShardWriter(tmp_path / str(number)) as writer:
            half = lengths[number * 1000 : (number + 1) * 1000]
            writer.add(np.arange(half.sum()) % 50000, half)
            writer.finish()
    sources = [tmp_path / "0", tmp_path / "1"]
    whole = ShuffledDocuments(sources, (1,)).write(0, 2000, tmp_path / "whole", False)
    monkeypatch.setattr(shuffle, "DOCUMENTS_AT_ONCE", 300)
    monkeypatch.setattr(shuffle, "TOKENS_AT_ONCE", 2500)  # some documents are longer
    tracemalloc.start()
    pieces = ShuffledDocuments(sources, (1,)).write(0, 2000, tmp_path / "pieces", False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pieces.bin_sha256 == whole.bin_sha256
    assert pieces.idx_sha256 == whole.idx_sha256
    assert pieces.tokens == lengths.sum()
    assert peak < whole.tokens  # half the bytes of the shard
