"""Evaluation predicts every token of a text once, with the context that the stride promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaegpt.data.tokens.windows import EvaluationWindows
from megaegpt.labels import IGNORE
from tests.data.corpora import counting_stream


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 100, 101, 103])
@pytest.mark.parametrize("stride", [None, 1, 3, 9, 10])
def test_every_target_exactly_once(tmp_path: Path, length: int, stride: int | None) -> None:
    windows = EvaluationWindows(counting_stream(tmp_path, length), 10, stride=stride)
    batch = windows.batch(np.arange(len(windows) + 2))
    tokens, targets = batch["tokens"], batch["targets"]
    valid = targets != IGNORE
    assert (targets[valid] == tokens[valid] + 1).all()
    assert sorted(targets[valid].tolist()) == list(range(1, length))
    assert valid[: len(windows)].any(axis=1).all()  # no window for nothing
    assert not valid[len(windows) :].any()


def test_a_stride_gives_each_target_its_context(tmp_path: Path) -> None:
    windows = EvaluationWindows(counting_stream(tmp_path, 103), 10, stride=3)
    batch = windows.batch(np.arange(len(windows)))
    for tokens, targets in zip(batch["tokens"][1:], batch["targets"][1:], strict=True):
        context = [np.count_nonzero(tokens < y) for y in targets[targets != IGNORE]]
        assert min(context) >= 10 - 3
        assert tokens[7] == tokens[0] + 7


def test_chunk_numbers_are_those_of_the_text(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path, 83)
    ids = EvaluationWindows(stream, 30, num_chunks=3).batch(np.arange(3))["chunk_ids"]
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    sliding = EvaluationWindows(stream, 30, num_chunks=3, stride=10).batch(np.arange(6))
    ids = sliding["chunk_ids"]
    assert ids[:3].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert (sliding["tokens"][:, 0] == ids[:, 0] * 10).all()
    whole = EvaluationWindows(stream, 30).batch(np.arange(2))  # of one chunk
    assert whole["chunk_ids"].tolist() == [[0], [1]]
    assert "chunk_ids" not in EvaluationWindows(stream, 30, stride=7).batch(np.arange(1))


def test_the_tokens_before_a_window_are_those_of_the_text(tmp_path: Path) -> None:
    windows = EvaluationWindows(counting_stream(tmp_path, 83), 30, num_chunks=3, overlap=4)
    batch = windows.batch(np.arange(4))
    assert batch["before"].tolist() == [[-1] * 4, [26, 27, 28, 29], [56, 57, 58, 59], [-1] * 4]
    assert "before" not in EvaluationWindows(windows.source, 30, 3).batch(np.arange(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chunks": 4}, "not 4 whole chunks"),
        ({"num_chunks": 3, "stride": 15}, "not whole chunks of 10"),
        ({"stride": 0}, "a stride of 0"),
        ({"stride": 31}, "a stride of 31"),
    ],
)
def test_windows_and_strides_must_fit(
    tmp_path: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationWindows(counting_stream(tmp_path, 83), 30, **options)
