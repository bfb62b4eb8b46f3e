"""Feature stores written by several ranks: the same bytes, and one failure for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megaegpt.data.features.store import FeatureStore
from megaegpt.data.features.writer import compute_features
from megaegpt.errors import DataError
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder
from tests.data.features.test_store import CHUNKS, SIZE, Stream, encode, pool, spec
from tests.distributed.harness import Distributed, grid_for
from tests.training.tiny import HIDDEN, encoder_config


def _compute(folder: Path, dtype: str, tp_size: int) -> str:
    """Encode with a real encoder; its fingerprint."""
    grid = grid_for(tp_size)
    encoder = FrozenEncoder(build_model(encoder_config(), grid, seed=3))
    wanted = spec(encoder=encoder.fingerprint, hidden_size=HIDDEN, dtype=dtype, token_states=True)
    compute_features(folder, wanted, Stream(), encoder, pool, grid, batch_size=3)
    return encoder.fingerprint


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_ranks_writes_the_same_store(
    tmp_path: Path, dtype: str, distributed: Distributed
) -> None:
    for ranks in (1, 2, 4):
        distributed(ranks, _compute, tmp_path / str(ranks), dtype, 1)
    alone = _content(tmp_path / "1")
    assert len(alone) == 2 + 2 * 3
    assert _content(tmp_path / "2") == alone
    assert _content(tmp_path / "4") == alone


def test_tensor_parallel_ranks_write_one_store_of_the_same_encoder(
    tmp_path: Path, distributed: Distributed
) -> None:
    (fingerprint,) = distributed(1, _compute, tmp_path / "1", "float32", 1)
    assert distributed(4, _compute, tmp_path / "4", "float32", 2) == [fingerprint] * 4
    wanted = spec(encoder=fingerprint, hidden_size=HIDDEN, token_states=True)
    alone, cut = (FeatureStore.open(tmp_path / name, wanted) for name in ("1", "4"))
    ids = torch.arange(CHUNKS)
    torch.testing.assert_close(cut.token_states(ids), alone.token_states(ids))
    assert cut.history(ids).equal(pool(cut.token_states(ids)))


def _fail_on_rank_1(folder: Path) -> tuple[str, bool, str]:
    grid = grid_for(1)

    def failing(tokens: Tensor) -> Tensor:
        if grid.rank == 1:
            raise DataError("shard is on a broken disk")
        return encode(tokens)

    try:
        compute_features(folder, spec(), Stream(), failing, pool, grid, batch_size=3)
    except DataError as error:
        return type(error).__name__, error.on_every_rank, str(error)
    return "no error", False, ""


def test_a_failure_on_one_rank_ends_all_and_the_others_parts_are_kept(
    tmp_path: Path, distributed: Distributed
) -> None:
    first, second = distributed(2, _fail_on_rank_1, tmp_path)
    assert first == ("DataError", True, "rank 1: shard is on a broken disk")
    assert second == ("DataError", True, "shard is on a broken disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features-00000.npy", "plan.json"]
    part = np.load(tmp_path / "features-00000.npy")
    tokens = torch.from_numpy(Stream.tokens[: 16 * SIZE].astype(np.int64)).view(16, SIZE)
    assert torch.from_numpy(part).equal(pool(encode(tokens)))
