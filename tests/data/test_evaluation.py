"""Evaluation predicts every token of a split once, however it is shared out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaegpt.data.evaluation import IGNORED, EvaluationWindows, evaluation_windows
from tests.data.corpora import counting_stream


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 100, 101, 103])
@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_target_exactly_once_over_all_ranks(
    tmp_path: Path, tokens: int, dp_size: int, batch_size: int
) -> None:
    stream = counting_stream(tmp_path, tokens)
    ranks = [list(evaluation_windows(stream, 10, batch_size, r, dp_size)) for r in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    targets = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == batch.targets.shape == (batch_size, 10)
        valid = batch.targets != IGNORED
        assert (batch.targets[valid] == batch.tokens[valid] + 1).all()
        assert (batch.tokens[~valid] == 0).all()
        targets += batch.targets[valid].tolist()
    assert sorted(targets) == list(range(1, tokens))


def test_chunk_numbers_are_those_of_the_stream(tmp_path: Path) -> None:
    windows = EvaluationWindows(counting_stream(tmp_path, 83), sample_len=30, chunk_size=10)
    assert len(windows) == 3
    batch = windows.batch(np.arange(4))
    assert batch.chunk_ids is not None
    assert batch.chunk_ids[:2].tolist() == [[0, 1, 2], [3, 4, 5]]
    # Chunk 8 has three tokens and is not stored: what is named for it only padding reads.
    assert batch.chunk_ids[2].tolist() == [6, 7, 7]
    assert (batch.tokens[:2, ::10] == batch.chunk_ids[:2] * 10).all()
    assert batch.chunk_ids.max() == 7
    assert (batch.targets[3] == IGNORED).all()


def test_windows_must_be_whole_chunks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not whole chunks"):
        EvaluationWindows(counting_stream(tmp_path, 83), sample_len=25, chunk_size=10)
