"""Blends keep to their weights, and any sample number is found without the ones before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaegpt.data.tokens.blend import Blend
from megaegpt.data.tokens.loader import TrainingLoader
from megaegpt.data.tokens.samples import ChunkWindows, PretrainingSamples
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import DataError
from megaegpt.parallel.grid import ProcessGrid
from tests.data.corpora import counting_stream

SPANS = [(0, 400), (400, 1200), (1200, 2400)]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """Three sets of shards, the last two of several: 400, 800 and 1,200 tokens."""
    prefixes = counting_stream(tmp_path_factory.mktemp("blend"), 2400, 400).prefixes
    return TokenStream(prefixes)


@pytest.fixture(scope="module")
def sources(stream: TokenStream) -> list[PretrainingSamples]:
    return [PretrainingSamples(stream, 4, seed, span) for seed, span in enumerate(SPANS)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6), st.integers(0, 10**9))
def test_every_block_ends_within_one_sample_of_the_weights(
    weights: list[float], block: int
) -> None:
    blend = Blend([_Nothing()] * len(weights), weights, seed=1)  # type: ignore[list-item]
    before, after = blend.counts(block), blend.counts(block + 1)
    samples = block * blend.block_size
    assert sum(before) == samples
    assert all(b >= a for a, b in zip(before, after, strict=True))
    for count, weight in zip(before, blend.weights, strict=True):
        # Floats cannot say a weight's share of 10^12 samples to better than their own precision.
        assert abs(count - weight * samples) <= 1 + samples * 1e-15


class _Nothing:
    sample_len = 4
    stream = None


def test_each_source_is_walked_in_its_own_order_without_gaps(
    sources: list[PretrainingSamples],
) -> None:
    blend = Blend(sources, [0.5, 0.3, 0.2], seed=1)
    found, inside = blend.locate(np.arange(4 * blend.block_size))
    for source in range(3):
        numbers = np.sort(inside[found == source])
        assert np.array_equal(numbers, np.arange(len(numbers)))
    shares = np.bincount(found) / len(found)
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() <= 1 / len(found)


def test_a_blend_is_mixed_inside_a_block(sources: list[PretrainingSamples]) -> None:
    found, _ = Blend(sources, [1, 1, 1], seed=1).locate(np.arange(1024))
    changes = (np.diff(found) != 0).mean()
    assert 0.6 < changes < 0.73  # two thirds for independent draws


def test_rows_come_from_the_source_that_locate_names(sources: list[PretrainingSamples]) -> None:
    blend = Blend(sources, [2, 1, 1], seed=4)
    numbers = np.array([5, 2000, 3, 1024, 1023])
    rows = blend.batch(numbers)["tokens"]
    for row, source, inside in zip(rows, *blend.locate(numbers), strict=True):
        assert np.array_equal(row, sources[source].batch(np.array([inside]))["tokens"][0])
        first, end = SPANS[source]
        assert first <= row.min() <= row.max() < end


def test_windows_of_chunks_stay_on_the_grid_of_the_whole_stream(stream: TokenStream) -> None:
    windows = [ChunkWindows(stream, 3, 7, seed, span) for seed, span in enumerate(SPANS)]
    blend = Blend(windows, [1, 1, 2], seed=1)
    numbers = np.arange(2000)
    batch = blend.batch(numbers)
    tokens, chunks = batch["tokens"], batch["chunk_ids"]
    assert np.array_equal(tokens[:, 0], chunks[:, 0] * 7)
    assert (np.diff(chunks, axis=1) == 1).all()
    for source, row in zip(blend.locate(numbers)[0], tokens, strict=True):
        first, end = SPANS[source]
        assert first <= row[0] <= row[-1] < end
    for source, (first, end) in enumerate(SPANS):  # no chunk of a corpus is out of reach
        seen = np.unique(chunks[blend.locate(numbers)[0] == source])
        assert np.array_equal(seen, np.arange(-(-first // 7), (end - 1) // 7))


def test_a_run_resumes_in_the_middle_of_a_blend(sources: list[PretrainingSamples]) -> None:
    def batches(start: int, steps: int) -> list[np.ndarray]:
        blend = Blend(sources, [0.7, 0.2, 0.1], seed=1)
        with TrainingLoader(blend, ProcessGrid(), 16, 8, start_step=start) as loader:
            return [torch.cat([b["tokens"] for b in next(loader)]).numpy() for _ in range(steps)]

    whole = batches(0, 150)
    assert all(np.array_equal(a, b) for a, b in zip(whole[97:], batches(97, 53), strict=True))


def test_tokens_and_epochs_are_counted_by_source(sources: list[PretrainingSamples]) -> None:
    blend = Blend(sources, [0.5, 0.25, 0.25], seed=1)
    for samples in (0, 10, 5000):
        found, _ = blend.locate(np.arange(samples))
        expected = (np.bincount(found, minlength=3) * 4).tolist()
        assert blend.tokens_by_source(samples) == expected
    assert blend.progress(5000)["tokens/1"] == blend.tokens_by_source(5000)[1]
    seen = blend.progress(len(blend))
    assert max(seen[f"epochs/{n}"] for n in range(3)) == pytest.approx(1.0, abs=0.05)


def test_what_was_counted_before_is_not_counted_again(
    sources: list[PretrainingSamples], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports ask at every step; a weight of a millionth has a block of two million samples."""
    weights = [0.5, 0.4999, 0.0001]
    counted = []
    locate = Blend.locate

    def noting(blend: Blend, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counted.append(len(numbers))
        return locate(blend, numbers)

    monkeypatch.setattr(Blend, "locate", noting)
    blend = Blend(sources, weights, seed=1)
    for samples in (3, 10, 11, 30_000, 7, 40_010):
        assert blend.tokens_by_source(samples) == (
            Blend(sources, weights, seed=1).tokens_by_source(samples)
        ), samples
    assert counted[::2] == [3, 7, 1, 30_000 % blend.block_size, 7, 40_010 % blend.block_size]
    assert sum(blend.tokens_by_source(40_010)) == 40_010 * 4


def test_weights_that_do_not_fit_are_refused(sources: list[PretrainingSamples]) -> None:
    for weights in ([1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 2.0]):
        with pytest.raises(DataError, match="positive weights"):
            Blend(sources, weights, seed=1)


def test_a_corpus_without_a_whole_sample_is_named(stream: TokenStream) -> None:
    with pytest.raises(DataError, match="count-2400-400 has 6 tokens; one sample needs 9"):
        PretrainingSamples(stream, 8, 1, span=(400, 406))
    with pytest.raises(DataError, match="count-2400-800 has 20 tokens; a window of 3 chunks of 7"):
        ChunkWindows(stream, 3, 7, 1, span=(800, 820))
    before = "has 22 tokens; .* needs 22 behind the 5 before its first chunk's border"
    with pytest.raises(DataError, match=before):
        ChunkWindows(stream, 3, 7, 1, span=(800, 822))
    assert len(ChunkWindows(stream, 3, 7, 1, span=(800, 827))) == 1


@pytest.mark.parametrize("weights", [[1.0, 1e-30], [1e-30, 1.0], [1.0, 9e-10]])
def test_a_weight_that_gives_no_sample_is_named(weights: list[float]) -> None:
    sources = [_Nothing(), _Nothing()]
    name = ("first", "second")[weights.index(min(weights))]
    with pytest.raises(DataError, match=f"the weight of {name} is .* of all"):
        Blend(sources, weights, seed=1, names=("first", "second"))  # type: ignore[arg-type]
    Blend(sources, [1e-30, 1e-30], seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_weights_that_are_no_shares_are_refused(weight: float) -> None:
    with pytest.raises(DataError, match="2 sources need as many positive weights"):
        Blend([_Nothing()] * 2, [1.7e308, weight], seed=1)  # type: ignore[list-item]
