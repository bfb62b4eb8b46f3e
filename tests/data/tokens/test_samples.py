"""What a run sees follows from seed and sample number alone, and nothing is seen twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaegpt.data.tokens.samples import ChunkWindows, EpochLayout, PretrainingSamples
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.data.tokens.windows import EvaluationWindows
from megaegpt.errors import DataError
from megaegpt.labels import IGNORE
from tests.data.corpora import counting_stream, write_shard


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 1000), st.integers(0, 20))
def test_an_epoch_is_disjoint_spans_inside_the_data(
    total: int, size: int, seed: int, epoch: int
) -> None:
    size = min(size, total)
    layout = EpochLayout(total, size, seed)
    starts = np.sort(layout.starts(np.arange(layout.samples) + epoch * layout.samples))
    assert (np.diff(starts) == size).all()
    assert starts[0] >= 0
    assert starts[-1] + size <= total
    left_out = total - layout.samples * size
    assert left_out < 2 * size


def test_sample_tokens_are_consecutive_and_an_epoch_has_each_once(tmp_path: Path) -> None:
    samples = PretrainingSamples(counting_stream(tmp_path, 1001, 130), sample_len=10, seed=1)
    assert len(samples) == 99
    for epoch in range(3):
        batch = samples.batch(np.arange(99) + epoch * 99)
        tokens, targets = batch["tokens"], batch["targets"]
        assert tokens.dtype == targets.dtype == np.int64
        assert tokens.shape == targets.shape == (99, 10)
        assert tokens.flags.c_contiguous
        assert targets.flags.c_contiguous
        assert (np.diff(tokens, axis=1) == 1).all()
        assert np.array_equal(targets, tokens + 1)
        assert len(np.unique(targets)) == targets.size


def test_the_cuts_move_from_epoch_to_epoch_and_reach_every_token(tmp_path: Path) -> None:
    samples = PretrainingSamples(counting_stream(tmp_path, 64), sample_len=4, seed=3)
    batch = samples.batch(np.arange(200 * len(samples)))
    starts = batch["tokens"][:, 0]
    assert set((starts % 4).tolist()) == {0, 1, 2, 3}
    assert batch["targets"].max() == 63
    assert starts.min() == 0


def test_samples_do_not_depend_on_history(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path, 500)
    samples = PretrainingSamples(stream, sample_len=8, seed=1)
    in_order = samples.batch(np.arange(300))["tokens"]
    fresh = PretrainingSamples(stream, sample_len=8, seed=1)
    for number in (299, 0, 61, 60, 122):
        assert np.array_equal(fresh.batch(np.array([number]))["tokens"][0], in_order[number])
    other_seed = PretrainingSamples(stream, sample_len=8, seed=2).batch(np.arange(300))["tokens"]
    assert not np.array_equal(other_seed, in_order)


def test_a_corpus_of_a_trillion_tokens_needs_no_more_memory() -> None:
    """The layout is all that depends on the corpus' size; a stream of that size is not needed."""
    layout = EpochLayout(10**12, 1024, seed=1)
    assert layout.samples == (10**12 - 1023) // 1024
    for first in (0, 10**6, layout.samples - 4096, 2 * layout.samples - 2048):
        starts = layout.starts(np.arange(first, first + 4096))
        assert len(np.unique(starts)) >= 4095  # across an epoch's end two may coincide
        assert starts.min() >= 0
        assert starts.max() + 1024 <= 10**12


def test_windows_start_on_the_chunk_grid_and_do_not_overlap(tmp_path: Path) -> None:
    windows = ChunkWindows(counting_stream(tmp_path, 1003), num_chunks=4, chunk_size=10, seed=1)
    assert len(windows) == 24  # 100 trainable chunks
    phases = set()
    for epoch in range(40):
        batch = windows.batch(np.arange(24) + epoch * 24)
        tokens, chunk_ids = batch["tokens"], batch["chunk_ids"]
        assert np.array_equal(batch["targets"], tokens + 1)
        assert tokens.shape == (24, 40)
        assert chunk_ids.shape == (24, 4)
        assert np.array_equal(tokens, tokens[:, :1] + np.arange(40))
        assert np.array_equal(tokens[:, 0], chunk_ids[:, 0] * 10)
        assert len(np.unique(chunk_ids)) == 96
        assert chunk_ids.max() <= 99
        phases.add(int(chunk_ids.min()))
    assert phases == {0, 1, 2, 3, 4}


def test_windows_bring_the_tokens_before_them(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path, 1003)
    plain, behind = (ChunkWindows(stream, 4, 10, seed=1, overlap=overlap) for overlap in (0, 3))
    batch = behind.batch(np.arange(48))
    for name, value in plain.batch(np.arange(48)).items():
        assert np.array_equal(batch[name], value)
    first = batch["tokens"][:, :1]
    expected = np.where(first == 0, -1, first + np.arange(-3, 0))
    assert (first == 0).any()
    assert np.array_equal(batch["before"], expected)


def test_data_of_exactly_one_sample_works_and_less_is_refused(tmp_path: Path) -> None:
    assert len(PretrainingSamples(counting_stream(tmp_path, 9), sample_len=8, seed=1)) == 1
    with pytest.raises(DataError, match="has 8 tokens; one sample needs 9"):
        PretrainingSamples(counting_stream(tmp_path, 8), sample_len=8, seed=1)
    windows = ChunkWindows(counting_stream(tmp_path, 41), num_chunks=4, chunk_size=10, seed=1)
    assert windows.batch(np.array([0, 1]))["chunk_ids"].tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(DataError, match="has 40 tokens; a window of 4 chunks of 10 needs 41"):
        ChunkWindows(counting_stream(tmp_path, 40), num_chunks=4, chunk_size=10, seed=1)


END = 7


def _documents(folder: Path) -> TokenStream:
    """Short documents, empty ones among them, in two shards; each ends with a 7."""
    rng = np.random.default_rng(5)
    documents = [np.append(rng.integers(0, END, rng.integers(0, 6)), END) for _ in range(60)]
    parts = (("a", documents[:40]), ("b", documents[40:]))
    return TokenStream([write_shard(folder / name, part) for name, part in parts])


@pytest.mark.parametrize("kind", ["rows", "chunks", "windows", "chunk_windows", "sliding"])
def test_nothing_is_predicted_from_a_document_s_end_and_everything_else_is(
    tmp_path: Path, kind: str
) -> None:
    stream = _documents(tmp_path)
    made = {
        end: {
            "rows": PretrainingSamples(stream, 6, seed=1, document_end=end),
            "chunks": ChunkWindows(stream, 3, 2, seed=1, document_end=end),
            "windows": EvaluationWindows(stream, 6, document_end=end),
            "chunk_windows": EvaluationWindows(stream, 6, num_chunks=3, document_end=end),
            "sliding": EvaluationWindows(stream, 6, stride=2, document_end=end),
        }[kind]
        for end in (None, END)
    }
    whole, masked = (made[end].batch(np.arange(2 * len(made[end]))) for end in (None, END))
    at_end = dict.fromkeys(range(6), 0)
    for tokens, targets, found in zip(
        whole["tokens"], whole["targets"], masked["targets"], strict=True
    ):
        for place in range(6):
            follows_an_end = tokens[place] == END
            assert found[place] == (IGNORE if follows_an_end else targets[place])
            at_end[place] += int(follows_an_end and targets[place] != IGNORE)
    assert min(at_end.values() if kind != "sliding" else [at_end[5]]) > 0  # the last place too
    assert END in masked["targets"]  # the end itself is predicted
    for name in set(whole) - {"targets"}:
        assert np.array_equal(whole[name], masked[name])
