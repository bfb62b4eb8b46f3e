"""Several shards read as one row of tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaegpt.data.tokens import stream as stream_module
from megaegpt.data.tokens.shards import HEADER, MAGIC, ShardWriter
from megaegpt.data.tokens.stream import TokenStream, resolve_prefixes, shard_name
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
    monkeypatch.setattr(stream_module, "HASHED_BLOCK_BYTES", 16)  # to the end of large shards
    monkeypatch.setattr(stream_module, "HASHED_BLOCKS", 4)
    changed = tokens.copy()
    changed[-1] += 1
    last = TokenStream([write_shard(tmp_path / "d", [changed])])
    assert TokenStream([str(tmp_path / "a")]).fingerprint != last.fingerprint


def test_of_a_large_shard_the_fingerprint_reads_64_mib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stream_module.HASHED_BLOCKS * stream_module.HASHED_BLOCK_BYTES == 64 << 20
    monkeypatch.setattr(stream_module, "HASHED_BLOCK_BYTES", 16)
    monkeypatch.setattr(stream_module, "HASHED_BLOCKS", 4)
    pieces = []

    class Noting:
        def update(self, data: Any) -> None:
            pieces.append(len(memoryview(data)))

        def hexdigest(self) -> str:
            return ""

    stream = TokenStream([write_shard(tmp_path / name, [np.arange(1000)]) for name in ("a", "b")])
    monkeypatch.setattr(stream_module.hashlib, "sha256", Noting)
    _ = stream.fingerprint
    header, *blocks = pieces[: len(pieces) // 2]  # of the first shard
    assert header < 16
    assert blocks == [16] * 4
    assert pieces[len(pieces) // 2 :] == pieces[: len(pieces) // 2]


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


def test_a_set_is_not_one_whose_name_begins_alike(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "train-code-00000-of-00001", "train-00000-of-00001.old"):
        with ShardWriter(tmp_path / name) as writer:
            writer.add_document(np.arange(3, dtype=np.uint16))
            writer.finish()
    prefix = str(tmp_path / "train")
    assert resolve_prefixes([prefix]) == [f"{prefix}-00000-of-00001"]


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


def test_a_shard_and_a_set_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("train", shard_name("train", 0, 2)):
        write_shard(tmp_path / name, [np.array([1])])
    with pytest.raises(DataError, match=r"names the shard .*train\.idx and a set of shards"):
        resolve_prefixes([f"{tmp_path}/train"])


def test_spans_are_those_of_the_given_prefixes(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"set-{number:05d}-of-00003", [np.arange(4)])
    write_shard(tmp_path / "single", [np.arange(5)])
    stream = TokenStream([f"{tmp_path}/single", f"{tmp_path}/set"])
    assert stream.spans == [(0, 5), (5, 17)]
    assert [Path(stream.name_at(n)).name[:6] for n in (4, 5)] == ["single", "set-00"]


def test_rows_come_out_of_many_files_of_several_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "MAX_OPEN_FILES", 2)
    same = counting_stream(tmp_path, 100, shard_tokens=7)
    mixed = TokenStream([*same.prefixes, write_shard(tmp_path / "u", [np.arange(100, 120)])])
    starts = np.array([93, 0, 50, 14, 0, 77])
    for stream in (same, mixed):
        for length in (1, 5, 7):
            rows = np.empty((len(starts), length), np.int64)
            stream.read_rows(starts, rows)
            assert np.array_equal(rows, starts[:, None] + np.arange(length))


def test_a_file_that_shrinks_or_goes_after_it_was_opened_is_named(tmp_path: Path) -> None:
    rows = np.empty((1, 5), np.int64)
    stream = TokenStream([write_shard(tmp_path / "s", [np.arange(50)])])
    stream.read_rows(np.array([45]), rows)
    with open(tmp_path / "s.bin", "r+b") as file:
        file.truncate(40)
    with pytest.raises(DataError, match=r"s\.bin has become shorter since it was opened"):
        stream.read_rows(np.array([45]), rows)
    (tmp_path / "s.bin").unlink()
    stream.read_rows(np.array([3]), rows)  # still open
    other = TokenStream([write_shard(tmp_path / "t", [np.arange(50)])])
    (tmp_path / "t.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*t\.bin: No such file"):
        other.read_rows(np.array([3]), rows)


def write_zeros(prefix: Path, documents: int, length: int) -> None:
    """A shard of zeros that takes up no room on disk."""
    with open(f"{prefix}.bin", "wb") as tokens:
        tokens.truncate(2 * documents * length)
    with open(f"{prefix}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        index.write(np.full(documents, length, "<i4").tobytes())
        index.write((2 * length * np.arange(documents, dtype="<i8")).tobytes())
        index.write(np.arange(documents + 1, dtype="<i8").tobytes())


_DRAW = """
import json, sys, time
import numpy as np
from megaegpt.data.tokens.samples import PretrainingSamples
from megaegpt.data.tokens.stream import TokenStream

def memory(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))

began = time.perf_counter()
samples = PretrainingSamples(TokenStream([sys.argv[1]]), 1024, seed=1)
samples.batch(np.arange(8))
seconds, first = time.perf_counter() - began, memory("VmHWM")
for batch in range(100):
    samples.batch(np.arange(8) + 8 * batch)
own = memory("RssAnon")
for batch in range(100, 1200):
    samples.batch(np.arange(8) + 8 * batch)
print(json.dumps([seconds, first, memory("RssAnon") - own, memory("VmHWM")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process reads its size in /proc")
def test_a_billion_tokens_open_at_once_and_memory_stays_flat(tmp_path: Path) -> None:
    """Read through a map, 9,600 samples would make half a gigabyte of it resident."""
    write_zeros(tmp_path / "s", documents=500_000, length=2000)
    command = [sys.executable, "-c", _DRAW, f"{tmp_path}/s"]
    result = subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[3])
    seconds, first, growth, most = json.loads(result.stdout)
    assert seconds < 1
    assert first < 100  # MiB, the interpreter and numpy included
    assert growth < 4
    assert most < 100


def two_shards(folder: Path) -> TokenStream:
    """40 tokens; the second half's file has not been read from yet."""
    stream = counting_stream(folder, 40, shard_tokens=20)
    stream.read_rows(np.array([0]), np.empty((1, 5), np.int64))
    return stream


def test_a_shard_that_another_has_replaced_under_a_run_is_named(tmp_path: Path) -> None:
    stream = two_shards(tmp_path)
    path = stream.shards[1].bin_path
    content = path.read_bytes()
    path.unlink()  # the map keeps the old file
    path.write_bytes(content[::-1])
    with pytest.raises(DataError, match=rf"{path} has changed since it was opened"):
        stream.read_rows(np.array([25]), np.empty((1, 5), np.int64))
    with pytest.raises(DataError, match=rf"{path} has changed since it was opened"):
        stream.check_unchanged()


def test_a_shard_that_is_written_into_under_a_run_is_named_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = two_shards(tmp_path)
    assert stream.fingerprint
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream.check_unchanged()
    path = stream.shards[0].bin_path
    state = path.stat()
    with path.open("r+b") as file:
        file.write(b"\x09")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    row = np.empty((1, 5), np.int64)
    stream.read_rows(np.array([0]), row)  # not yet looked at again
    now += 6
    for read in (lambda: stream.read_rows(np.array([0]), row), lambda: stream.read(0, 5)):
        with pytest.raises(DataError, match=rf"{path} has changed since it was opened"):
            read()
        now += 6


def test_a_new_time_of_writing_over_the_same_content_stops_nothing(tmp_path: Path) -> None:
    stream = two_shards(tmp_path)
    assert stream.fingerprint
    os.utime(stream.shards[0].bin_path, ns=(1, 1))
    stream.check_unchanged()
    stream.check_unchanged()


def test_rows_are_held_against_a_vocabulary_where_one_is_set(tmp_path: Path) -> None:
    stream = counting_stream(tmp_path, 40, shard_tokens=20)
    rows = np.empty((2, 5), np.int64)
    stream.limit_ids(35)
    stream.read_rows(np.array([0, 30]), rows)
    with pytest.raises(DataError, match=r"count-40-20\.bin holds id 35 at token 15, outside"):
        stream.read_rows(np.array([0, 31]), rows)


@pytest.mark.parametrize("start", [10, 31])  # over two shards, and within one
def test_spans_are_held_against_a_vocabulary_where_one_is_set(tmp_path: Path, start: int) -> None:
    stream = counting_stream(tmp_path, 40, shard_tokens=20)
    stream.limit_ids(35)
    assert stream.read(start, 35 - start).tolist() == list(range(start, 35))
    assert not len(stream.read(start, 0))
    with pytest.raises(DataError, match=r"count-40-20\.bin holds id 35 at token 15, outside"):
        stream.read(start, 36 - start)
