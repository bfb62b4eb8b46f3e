"""Shards are held against the checksums beside them before anything is learned from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaegpt.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megaegpt.data.tokens import corpus_manifest as manifest
from megaegpt.data.tokens.corpus_manifest import Manifest, verify_shards
from megaegpt.data.tokens.shards import ShardSummary, ShardWriter
from megaegpt.errors import DataError
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
    monkeypatch.setattr(manifest, "_AUTOMATIC_BYTES", 100)
    verify_shards(prefixes, "auto")
    with pytest.raises(DataError, match="has changed"):
        verify_shards(prefixes, "always")


def test_shards_of_other_programs_need_no_manifest(prefixes: list[str]) -> None:
    (Path(prefixes[0]).parent / "manifest.json").unlink()
    verify_shards(prefixes, "always")
