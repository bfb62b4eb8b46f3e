"""Damaged and senseless input of any form gives the project's own errors, never a crash."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megaegpt.config.loading import load_config, validate
from megaegpt.data.features.store import FeatureSpec, FeatureStore
from megaegpt.data.tokens.samples import PretrainingSamples
from megaegpt.data.tokens.shards import Shard, ShardWriter
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import ConfigError, DataError
from megaegpt.parallel.grid import ProcessGrid
from tests.tiny.stores import compute_features

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
KEYS = [
    f"{section}.{key}"
    for path in CONFIGS
    for section, keys in yaml.safe_load(path.read_text()).items()
    if isinstance(keys, dict)
    for key in keys
]

many = settings(
    max_examples=int(os.environ.get("MEGAEGPT_FUZZ", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# -- configurations

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
small_numbers = st.integers(-2, 70) | st.sampled_from([0.5, 1e-3, 1e300, 2**62, 2**70])


def _load(path: Path, overrides: tuple[str, ...] = (), world_size: int | None = None) -> None:
    with contextlib.suppress(ConfigError):
        validate(load_config(path, overrides), world_size)


@many
@given(changes=st.dictionaries(st.sampled_from(KEYS), values | small_numbers, max_size=4))
def test_any_value_of_any_key_is_accepted_or_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    content: dict[str, Any] = {}
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        content.setdefault(section, {})[key] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    _load(path, world_size=4)


@many
@given(content=values)
def test_any_document_is_accepted_or_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    _load(path)


@many
@given(
    path=st.sampled_from(CONFIGS),
    start=st.floats(0, 1),
    removed=st.integers(0, 40),
    inserted=st.binary(max_size=12),
)
def test_a_file_with_any_bytes_in_it_is_accepted_or_refused(
    tmp_path: Path, path: Path, start: float, removed: int, inserted: bytes
) -> None:
    text = b"".join(line for line in path.open("rb") if b"#" not in line)
    position = int(start * len(text))
    damaged = tmp_path / "damaged.yaml"
    damaged.write_bytes(text[:position] + inserted + text[position + removed :])
    _load(damaged)


@many
@given(key=st.sampled_from(KEYS) | st.text(max_size=12), text=st.text(max_size=12))
@example(key="model.num_layers", text="!!python/object:os.system {}")
@example(key="model.num_layers", text="2001-99-99")
@example(key="deepspeed", text="{zero_optimization: 3}")
def test_any_override_is_accepted_or_refused(tmp_path: Path, key: str, text: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    _load(path, (f"{key}={text}",))


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "9" * 5000, "a: 2001-99-99"])
def test_what_yaml_cannot_stand_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(path)


# -- data

damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "append", "zero"]), st.floats(0, 1), st.integers(1, 255)
    ),
    min_size=1,
    max_size=3,
)


def _damage(content: bytes, kinds: list[tuple[str, float, int]]) -> bytes:
    damaged = bytearray(content)
    for kind, where, value in kinds:
        at = min(int(where * len(damaged)), max(len(damaged) - 1, 0))
        if kind == "cut":
            del damaged[at:]
        elif kind == "append":
            damaged += bytes([value]) * (value % 9 + 1)
        elif damaged:
            damaged[at] = damaged[at] ^ value if kind == "flip" else 0
    return bytes(damaged)


@contextlib.contextmanager
def _damaged(path: Path, kinds: list[tuple[str, float, int]]) -> Iterator[bool]:
    """The file is damaged for a while; whether it differs at all."""
    whole = path.read_bytes()
    damaged = _damage(whole, kinds)
    path.write_bytes(damaged)
    try:
        yield damaged != whole
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five documents, one of them empty."""
    prefix = tmp_path_factory.mktemp("shards") / "train"
    with ShardWriter(prefix) as writer:
        for length in (30, 7, 0, 100, 1):
            writer.add_document(np.arange(length, dtype=np.uint16))
        writer.finish()
    return prefix


def _error_of(read: Callable[[Path], None], path: Path) -> str | None:
    """Message of the project's own error; None if all is read."""
    try:
        read(path)
    except DataError as error:
        return str(error)
    return None


def _read_shard(prefix: Path) -> None:
    shard = Shard(prefix)
    shard.verify(vocab_size=200)
    for number in range(shard.num_documents):
        shard.document(number)


def _read_stream(prefix: Path) -> None:
    stream = TokenStream((str(prefix),))
    samples = PretrainingSamples(stream, 8, seed=1)
    samples.batch(np.arange(len(samples)))


@many
@given(suffix=st.sampled_from([".bin", ".idx"]), kinds=damages)
@pytest.mark.parametrize("read", [_read_shard, _read_stream])
def test_any_damage_to_a_shard_is_survived_or_refused(
    shard: Path, read: Callable[[Path], None], suffix: str, kinds: list
) -> None:
    with _damaged(shard.with_suffix(suffix), kinds):
        error = _error_of(read, shard)
    assert error is None or str(shard) in error


SPEC = FeatureSpec("e" * 8, "s" * 8, 40, 4, 8, "float32")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of 40 chunks, in parts of 16."""
    folder = tmp_path_factory.mktemp("features")
    tokens = np.arange(160, dtype=np.uint16)
    with ShardWriter(folder / "train") as writer:
        writer.add_document(tokens)
        writer.finish()

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return batch.unsqueeze(-1).expand(*batch.shape, 8).float()

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        compute_features(
            folder / "store",
            SPEC,
            TokenStream((str(folder / "train"),)),
            encode=encode,  # type: ignore[arg-type]
            grid=ProcessGrid(),
            batch_size=8,
            title="test",
        )
    return folder / "store"


def _read_store(folder: Path) -> None:
    store = FeatureStore.open(folder, SPEC)
    store.history(np.arange(40))
    store.verify()


@many
@given(name=st.sampled_from(["manifest.json", *SPEC.part_names()]), kinds=damages)
def test_any_damage_to_a_feature_store_is_found(store: Path, name: str, kinds: list) -> None:
    with _damaged(store / name, kinds) as differs:
        error = _error_of(_read_store, store)
    if error is None:
        assert not differs or name == "manifest.json"
    else:
        assert str(store) in error
