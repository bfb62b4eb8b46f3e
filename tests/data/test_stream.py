"""Several shards read as one row of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaegpt.data import stream as stream_module
from megaegpt.data.stream import TokenStream, resolve_prefixes, shard_name
from megaegpt.errors import DataError
from tests.data.corpora import counting_stream, write_shard


def test_spans_are_the_same_however_the_tokens_are_cut(tmp_path: Path) -> None:
    whole = counting_stream(tmp_path, 100)
    cut = counting_stream(tmp_path, 100, shard_tokens=7)
    assert len(cut) == 100
    for start, length in [(0, 100), (6, 2), (7, 7), (13, 1), (20, 50), (99, 1), (100, 0), (5, 0)]:
        expected = list(range(start, start + length))
        assert whole.read(start, length).tolist() == expected
        assert cut.read(start, length).tolist() == expected
    starts = np.array([0, 6, 7, 40, 90])
    out = np.empty((5, 10), np.int64)
    cut.read_rows(starts, out)
    assert np.array_equal(out, starts[:, None] + np.arange(10))


def test_spans_outside_are_an_error(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path, 10)
    for start, length in [(-1, 2), (9, 2), (11, 0), (0, -1)]:
        with pytest.raises(IndexError):
            stream.read(start, length)


def test_shards_without_tokens_in_between_are_passed_over(tmp_path: Path) -> None:
    prefixes = [
        write_shard(tmp_path / "a", []),
        write_shard(tmp_path / "b", [np.array([1, 2])]),
        write_shard(tmp_path / "c", [np.array([], np.int64)]),
        write_shard(tmp_path / "d", [np.array([3])]),
    ]
    assert TokenStream(prefixes).read(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="no tokens in"):
        TokenStream(prefixes[:1])
    with pytest.raises(DataError, match="no tokens in an empty list"):
        TokenStream([])


def test_the_fingerprint_follows_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.arange(1000) % 7
    first = TokenStream([write_shard(tmp_path / "a", [tokens])])
    copy = TokenStream([write_shard(tmp_path / "b", [tokens])])
    changed = tokens.copy()
    changed[500] += 1
    other = TokenStream([write_shard(tmp_path / "c", [changed])])
    assert first.fingerprint == copy.fingerprint
    assert first.fingerprint != other.fingerprint
    monkeypatch.setattr(stream_module, "_HASHED_BLOCK", 16)  # large shards are sampled to their end
    monkeypatch.setattr(stream_module, "_HASHED_BLOCKS", 4)
    changed = tokens.copy()
    changed[-1] += 1
    last = TokenStream([write_shard(tmp_path / "d", [changed])])
    assert TokenStream([str(tmp_path / "a")]).fingerprint != last.fingerprint


def test_patterns_name_a_shard_a_set_or_a_glob(tmp_path: Path) -> None:
    for name in ("train", "validation-00000-of-00002", "validation-00001-of-00002", "other"):
        write_shard(tmp_path / name, [np.array([1])])
    assert resolve_prefixes([f"{tmp_path}/train"]) == [f"{tmp_path}/train"]
    assert resolve_prefixes([f"{tmp_path}/train.bin"]) == [f"{tmp_path}/train"]
    assert resolve_prefixes([f"{tmp_path}/validation", f"{tmp_path}/t*"]) == [
        f"{tmp_path}/validation-00000-of-00002",
        f"{tmp_path}/validation-00001-of-00002",
        f"{tmp_path}/train",
    ]


def test_a_pattern_for_nothing_names_what_is_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "train", [np.array([1])])
    with pytest.raises(DataError, match=r"no shards at .*/trian: .*trian\.idx .*has train"):
        resolve_prefixes([f"{tmp_path}/trian"])


def test_an_incomplete_set_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / shard_name("train", 0, 3), [np.array([1])])
    write_shard(tmp_path / shard_name("train", 2, 3), [np.array([1])])
    with pytest.raises(DataError, match=r"train-00001-of-00003\.idx is missing: 2 of 3"):
        resolve_prefixes([f"{tmp_path}/train"])
    write_shard(tmp_path / shard_name("train", 1, 2), [np.array([1])])
    with pytest.raises(DataError, match="sets of 00002 and 00003 shards"):
        resolve_prefixes([f"{tmp_path}/train"])


def test_spans_are_those_of_the_given_prefixes(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"set-{number:05d}-of-00003", [np.arange(4)])
    write_shard(tmp_path / "single", [np.arange(5)])
    stream = TokenStream([f"{tmp_path}/single", f"{tmp_path}/set"])
    assert stream.spans == [(0, 5), (5, 17)]
    assert [Path(stream.name_at(n)).name[:6] for n in (4, 5)] == ["single", "set-00"]
