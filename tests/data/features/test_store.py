"""The feature store: what is read is what was encoded, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaegpt import files
from megaegpt.data.features import store as feature_store
from megaegpt.data.features import writer
from megaegpt.data.features.store import FeatureSpec, FeatureStore
from megaegpt.data.tokens import memory_map
from megaegpt.errors import DataError
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.stores import compute_features

CHUNKS, SIZE, WIDTH = 45, 4, 12
_TABLE = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))


class Stream:
    """45 chunks of random tokens, and half of one more."""

    tokens = np.random.default_rng(0).integers(0, 100, CHUNKS * SIZE + 2).astype(np.uint16)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def encode(tokens: Tensor) -> Tensor:
    """States that depend on the tokens of the chunk so far."""
    return _TABLE[tokens].cumsum(-2)


def spec(**changes: Any) -> FeatureSpec:
    values: dict[str, Any] = {
        "encoder": "e" * 64,
        "shards": "s" * 64,
        "num_chunks": CHUNKS,
        "chunk_size": SIZE,
        "hidden_size": WIDTH,
        "dtype": "float32",
    }
    return FeatureSpec(**values | changes)


def compute(folder: Path, wanted: FeatureSpec, encoder: Any = encode) -> FeatureStore:
    return compute_features(folder, wanted, Stream(), encoder, ProcessGrid(), batch_size=5)


def all_states() -> Tensor:
    tokens = torch.from_numpy(Stream.tokens[: CHUNKS * SIZE].astype(np.int64))
    return encode(tokens.view(CHUNKS, SIZE))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_gives_back_the_encoder_s_states_in_any_order(tmp_path: Path, dtype: str) -> None:
    store = compute(tmp_path, spec(dtype=dtype, token_states=True))
    states = all_states().to(getattr(torch, dtype))
    ids = torch.tensor([[44, 0, 17], [17, 3, 31]])
    assert store.token_states(ids).equal(states[ids])
    assert store.history(ids).equal(states[ids][..., -1, :])
    assert store.history(ids[:, :0]).shape == (2, 0, WIDTH)
    on_disk = sum(len(np.load(p).tobytes()) for p in tmp_path.glob("*.npy"))
    assert store.spec.num_bytes == on_disk


def test_reading_lets_go_of_pages_and_reads_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_map, "MAX_RESIDENT_BYTES", 1)
    dropped, drop = [], memory_map.drop_pages

    def noting(content: np.ndarray) -> None:
        dropped.append(type(content.base))
        drop(content)

    monkeypatch.setattr(memory_map, "drop_pages", noting)
    store = compute(tmp_path, spec())
    for _ in range(3):
        assert store.history(torch.arange(CHUNKS)).equal(all_states()[:, -1])
    assert len(dropped) >= 2 * store.spec.num_parts
    assert set(dropped) == {mmap.mmap}


def test_a_complete_store_is_not_computed_again(tmp_path: Path) -> None:
    compute(tmp_path, spec())

    def refuses(tokens: Tensor) -> Tensor:
        raise AssertionError("encoded again")

    compute(tmp_path, spec(), refuses)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "f" * 64}, ["encoder", "eeee", "ffff"]),
        ({"shards": "t" * 64}, ["shards"]),
        ({"chunk_size": 2, "num_chunks": 90}, ["chunk_size is 4 there and 2 here", "num_chunks"]),
        ({"dtype": "bfloat16"}, ["dtype"]),
        ({"token_states": True}, ["token_states is False there and True here"]),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_store_of_something_else_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: list[str], complete: bool
) -> None:
    compute(tmp_path, spec())
    if not complete:
        (tmp_path / "manifest.json").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(DataError) as caught:
        compute(tmp_path, spec(**changes))
    assert all(word in str(caught.value) for word in [str(tmp_path), *words])
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_store_of_an_earlier_versions_features_is_refused(tmp_path: Path) -> None:
    compute(tmp_path, spec())
    path = tmp_path / "manifest.json"
    assert json.loads(path.read_text())["features_per_chunk"] == 1
    path.write_text(path.read_text().replace('"pooling": "last"', '"pooling": "mean"'))
    with pytest.raises(DataError, match="pooling is mean there and last here"):
        FeatureStore.open(tmp_path, spec())


def test_token_states_that_are_not_needed_do_no_harm(tmp_path: Path) -> None:
    compute(tmp_path, spec(token_states=True))
    store = compute(tmp_path, spec())
    assert store.history(torch.arange(CHUNKS)).equal(all_states()[:, -1])


def test_a_partial_chunk_that_is_stored_for_its_token_states_does_no_harm(tmp_path: Path) -> None:
    compute(tmp_path, spec(num_chunks=CHUNKS + 1, token_states=True))
    store = compute(tmp_path, spec())
    assert store.history(torch.arange(CHUNKS)).equal(all_states()[:, -1])
    for count in (CHUNKS - 1, CHUNKS + 2):
        with pytest.raises(DataError, match=f"num_chunks is {CHUNKS + 1} there and {count} here"):
            FeatureStore.open(tmp_path, spec(num_chunks=count))


def test_a_damaged_store_is_refused_by_the_file_s_name(tmp_path: Path) -> None:
    compute(tmp_path, spec())
    part = tmp_path / "features-00001.npy"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"features-00001\.npy"):
        FeatureStore.open(tmp_path, spec())
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    store = FeatureStore.open(tmp_path, spec())
    with pytest.raises(DataError, match=r"features-00001\.npy.*damaged"):
        store.verify()
    part.write_bytes(whole)
    store.verify()


def _flip_a_bit(part: Path, folder: Path) -> None:
    content = bytearray(part.read_bytes())
    content[-3] ^= 4
    part.write_bytes(content)


def _zero_a_chunk(part: Path, folder: Path) -> None:
    values = np.load(part)
    values[3] = 0
    np.save(part, values)


def _swap_two_parts(part: Path, folder: Path) -> None:
    other = part.with_name("features-00001.npy")
    content = part.read_bytes()
    part.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _take_the_part_of_another_split(part: Path, folder: Path) -> None:
    compute(folder / "other", spec(shards="t" * 64), lambda tokens: encode(tokens) + 1)
    part.write_bytes((folder / "other" / part.name).read_bytes())


def _round_to_bfloat16(part: Path, folder: Path) -> None:
    np.save(part, torch.from_numpy(np.load(part)).bfloat16().float().numpy())


def _store_as_bfloat16(part: Path, folder: Path) -> None:
    np.save(part, torch.from_numpy(np.load(part)).bfloat16().view(torch.uint16).numpy())


def _append_a_byte(part: Path, folder: Path) -> None:
    part.write_bytes(part.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip_a_bit, "sha256"),
        (_zero_a_chunk, "sha256"),
        (_swap_two_parts, "sha256"),
        (_take_the_part_of_another_split, "a part of another store"),
        (_round_to_bfloat16, "sha256"),
        (_store_as_bfloat16, "holds uint16 instead of float32"),
        (_append_a_byte, "longer than its array"),
        (lambda part, folder: part.unlink(), "missing"),
    ],
)
def test_a_run_does_not_start_on_a_store_that_is_not_what_was_written(
    tmp_path: Path, damage: Any, said: str
) -> None:
    folder = tmp_path / "store"
    compute(folder, spec())
    damage(folder / "features-00000.npy", tmp_path)
    with pytest.raises(DataError, match=rf"features-00000\.npy: .*{said}"):
        compute(folder, spec())


def test_a_long_store_is_read_whole_only_if_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = compute(tmp_path, spec())
    _flip_a_bit(tmp_path / "features-00002.npy", tmp_path)
    damaged.verify("never")
    with pytest.raises(DataError):
        damaged.verify("auto")
    damaged.verify("always", rank=1, world_size=2)  # the other rank has the damaged part
    monkeypatch.setattr(feature_store, "AUTO_VERIFY_BYTES", spec().num_bytes - 1)
    damaged.verify("auto")
    with pytest.raises(DataError):
        damaged.verify("always")


def test_a_store_of_an_encoder_that_computes_otherwise_is_refused_and_an_earlier_one_taken(
    tmp_path: Path,
) -> None:
    compute(tmp_path, spec(encoder_arithmetic="2:" + "a" * 64))
    with pytest.raises(DataError, match="encoder_arithmetic is 2:aaaa"):
        compute(tmp_path, spec(encoder_arithmetic="2:" + "b" * 64))
    for earlier in ("a" * 64, None):
        for name in ("manifest.json", "plan.json"):
            content = json.loads((tmp_path / name).read_text())
            content["encoder_arithmetic"] = earlier
            if earlier is None:
                del content["encoder_arithmetic"]
            (tmp_path / name).write_text(json.dumps(content))
        compute(tmp_path, spec(encoder_arithmetic="2:" + "b" * 64))


def test_what_another_precision_computed_is_refused_and_an_earlier_store_taken(
    tmp_path: Path,
) -> None:
    compute(tmp_path, spec(computed="bf16"))
    with pytest.raises(DataError, match="computed is bf16 there and fp32 here"):
        compute(tmp_path, spec(computed="fp32"))
    for name in ("manifest.json", "plan.json"):
        content = json.loads((tmp_path / name).read_text())
        del content["computed"]
        (tmp_path / name).write_text(json.dumps(content))
    compute(tmp_path, spec(computed="fp32"))


def test_without_a_manifest_a_store_does_not_open(tmp_path: Path) -> None:
    compute(tmp_path, spec())
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="no complete feature store"):
        FeatureStore.open(tmp_path, spec())


def test_a_full_disk_is_reported_and_leaves_no_part_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot write"):
            compute(tmp_path, spec(token_states=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    compute(tmp_path, spec(token_states=True)).verify()


_SLOW = """
import sys, time
from pathlib import Path
from tests.data.features import test_store as t
def encode(tokens):
    time.sleep(0.15)
    return t.encode(tokens)
t.compute(Path(sys.argv[1]), t.spec(), encode)
"""


def test_parts_that_another_machine_s_disk_shows_late_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS may say for a minute that a file is not there which another machine has written."""

    def publish_late(temporary: Path, path: Path) -> None:
        unseen = temporary.rename(path.with_suffix(".unseen"))
        threading.Timer(0.2, unseen.rename, [path]).start()

    monkeypatch.setattr(writer, "publish", publish_late)
    store = compute(tmp_path / "store", spec(token_states=True))
    assert torch.equal(store.token_states(np.arange(CHUNKS)), all_states())


def test_a_part_that_never_comes_is_named_after_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "NETWORK_DELAY_S", 0.1)
    monkeypatch.setattr(writer, "publish", lambda temporary, path: temporary.unlink())
    with pytest.raises(DataError, match="No such file"):
        compute(tmp_path / "store", spec())


def test_a_killed_computation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(tmp_path)], cwd=root)
    first = tmp_path / "features-00000.npy"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # inside the second part
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "manifest.json").exists()
    written = first.stat().st_mtime_ns
    seen: list[int] = []

    def counting(tokens: Tensor) -> Tensor:
        seen.append(len(tokens))
        return encode(tokens)

    store = compute(tmp_path, spec(), counting)
    assert first.stat().st_mtime_ns == written
    assert sum(seen) == CHUNKS - 16
    assert store.history(torch.arange(CHUNKS)).equal(all_states()[:, -1])
    assert not list(tmp_path.glob("*.tmp"))
    assert os.listdir(tmp_path).count("manifest.json") == 1


def test_parts_do_not_depend_on_the_batch_size_and_are_bounded_in_number() -> None:
    for chunks in (1, 16, 17, 4096, 4097, 10**7):
        wanted = dataclasses.replace(spec(), num_chunks=chunks)
        covered = [wanted.part_chunks(part) for part in range(wanted.num_parts)]
        assert covered[0].start == 0
        assert covered[-1].stop == chunks
        assert all(a.stop == b.start for a, b in itertools.pairwise(covered))
        assert len(covered) <= 256


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b""])
def test_a_description_that_is_no_object_is_one_line_with_its_remedy(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"plan\.json is damaged: .*; delete {tmp_path}"):
        feature_store.read_json(tmp_path / "plan.json")
