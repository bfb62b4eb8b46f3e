"""Shards are held against the checksums beside them before anything is learned from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaegpt.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megaegpt.data.tokens import corpus_manifest as manifest
from megaegpt.data.tokens.corpus_manifest import Manifest, verify_shards
from megaegpt.data.tokens.shards import ShardSummary, ShardWriter
from megaegpt.errors import DamagedManifestError, DataError
from megaegpt.training.run_data import PretrainingData

_SHARDS = 3


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    """A set of shards with a manifest."""
    summaries: list[ShardSummary] = []
    found = []
    for number in range(_SHARDS):
        prefix = tmp_path / f"train-{number:05d}-of-{_SHARDS:05d}"
        with ShardWriter(prefix, np.uint16) as writer:
            writer.add_document(np.arange(100 + number))
            summaries.append(writer.finish())
        found.append(str(prefix))
    Manifest({}, {}, {}, {"train": summaries}).save(tmp_path)
    return found


def flip_a_bit(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def config_of(prefixes: list[str]) -> RunConfig:
    return RunConfig(
        model=ModelConfig(max_seq_len=16),
        data=DataConfig(train=tuple(prefixes)),
        training=TrainingConfig(steps=1),
    )


def test_a_run_over_a_flipped_bit_does_not_start(prefixes: list[str]) -> None:
    PretrainingData(config_of(prefixes))
    flip_a_bit(f"{prefixes[1]}.bin")
    with pytest.raises(DataError, match=r"train-00001-of-00003\.bin has changed"):
        PretrainingData(config_of(prefixes))


@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_ranks_share_the_files_and_miss_none(prefixes: list[str], world_size: int) -> None:
    for path in (f"{prefix}{suffix}" for prefix in prefixes for suffix in (".bin", ".idx")):
        content = Path(path).read_bytes()
        flip_a_bit(path)
        reports = []
        for rank in range(world_size):
            try:
                verify_shards(prefixes, rank=rank, world_size=world_size)
            except DataError as error:
                reports.append(str(error))
        assert len(reports) == 1
        assert path in reports[0]
        Path(path).write_bytes(content)


def test_only_the_shards_of_the_run_are_read(prefixes: list[str]) -> None:
    flip_a_bit(f"{prefixes[0]}.bin")
    verify_shards(prefixes[1:])


def test_large_sets_are_verified_when_asked_for(
    prefixes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_a_bit(f"{prefixes[0]}.bin")
    verify_shards(prefixes, "never")
    monkeypatch.setattr(manifest, "AUTO_VERIFY_BYTES", 100)
    verify_shards(prefixes, "auto")
    with pytest.raises(DataError, match="has changed"):
        verify_shards(prefixes, "always")


def test_shards_of_other_programs_need_no_manifest(prefixes: list[str]) -> None:
    (Path(prefixes[0]).parent / "manifest.json").unlink()
    verify_shards(prefixes, "always")


SHARD = {"name": "train", "documents": 1, "tokens": 2, "bin_sha256": "", "idx_sha256": ""}
WHOLE: dict[str, Any] = {
    "format": 1, "tokenizer": {}, "plan": {}, "counts": {"tokens": 2}, "splits": {"train": [SHARD]}
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},
        {"format": 2},
        {"tokenizer": None},
        {"plan": []},
        {"counts": None},
        {"counts": {"tokens": "2"}},
        {"counts": {"tokens": -1}},
        {"splits": None},
        {"splits": {"train": None}},
        {"splits": {"train": [None]}},
        {"splits": {"train": [{"name": "train"}]}},
        {"splits": {"train": [{**SHARD, "name": None}]}},
        {"splits": {"train": [{**SHARD, "name": "../train"}]}},
        {"splits": {"train": [{**SHARD, "name": "/dev/zero"}]}},
        {"splits": {"train": [{**SHARD, "name": "tr\0ain"}]}},
        {"splits": {"train": [{**SHARD, "tokens": 1e400}]}},
        {"splits": {"train": [{**SHARD, "more": 1}]}},
        {"more": 1},
    ],
)
def test_a_manifest_of_another_shape_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(WHOLE))
    assert Manifest.load(tmp_path).splits["train"][0].tokens == 2
    path.write_text(json.dumps({**WHOLE, **change}))
    with pytest.raises(DataError, match=r"manifest\.json (is damaged|has format)") as error:
        Manifest.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"9" * 5000])
def test_what_is_no_manifest_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedManifestError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"version": 2}', '{"format": 1}'])
def test_another_program_s_manifest_is_not_called_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is not a manifest of shards") as error:
        Manifest.load(tmp_path)
    assert type(error.value) is DataError
    assert "\n" not in str(error.value)


def test_a_device_in_a_files_place_is_not_read(prefixes: list[str]) -> None:
    folder = Path(prefixes[0]).parent
    found = Manifest.load(folder)
    Path(f"{prefixes[0]}.bin").unlink()
    Path(f"{prefixes[0]}.bin").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"train-00000-of-00003\.bin is a pipe or a device"):
        found.verify(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read: it is no regular file"):
        Manifest.load(folder)
