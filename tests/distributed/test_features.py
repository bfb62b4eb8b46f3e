"""Feature stores written by several ranks: the same bytes, and one failure for all."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megaegpt.data.features import writer
from megaegpt.data.features.store import FeatureSpec, FeatureStore
from megaegpt.errors import DataError
from megaegpt.model.build import build_model
from megaegpt.model.encoder import FrozenEncoder
from tests.data.features.test_store import CHUNKS, SIZE, Stream, encode, spec
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import HIDDEN, encoder_config
from tests.tiny.stores import compute_features


def _compute(folder: Path, dtype: str, tp_size: int) -> str:
    """Encode with a real encoder; its fingerprint."""
    grid = grid_for(tp_size)
    encoder = FrozenEncoder(build_model(encoder_config(), grid, seed=3))
    wanted = spec(encoder=encoder.fingerprint, hidden_size=HIDDEN, dtype=dtype, token_states=True)
    compute_features(folder, wanted, Stream(), encoder, grid, batch_size=3)
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
    assert cut.history(ids).equal(cut.token_states(ids)[:, -1])


def _fail_on_rank_1(folder: Path) -> tuple[str, bool, str]:
    grid = grid_for(1)

    def failing(tokens: Tensor) -> Tensor:
        if grid.rank == 1:
            raise DataError("shard is on a broken disk")
        return encode(tokens)

    try:
        compute_features(folder, spec(), Stream(), failing, grid, batch_size=3)
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
    assert torch.from_numpy(part).equal(encode(tokens)[:, -1:])


class _UnreadableStream(Stream):
    """Shards on a disk that fails from the second batch on."""

    def read(self, start: int, length: int) -> np.ndarray:
        if start > 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(start, length)


def _no_more_files(*_: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


def _fail_to_append(self: writer.PartFile, values: Tensor) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _fail_on_rank(failing: int, folder: Path, where: str, tp_size: int) -> str:
    """Encode with a real, collective encoder while a rank cannot open, read or append."""
    grid = grid_for(tp_size)
    encoder = FrozenEncoder(build_model(encoder_config(), grid, seed=3))
    wanted = spec(encoder=encoder.fingerprint, hidden_size=HIDDEN)
    stream = Stream()
    with pytest.MonkeyPatch.context() as patch:
        if grid.rank == failing:
            if where == "opening":
                patch.setattr(writer.PartFile, "__init__", _no_more_files)
            elif where == "appending":
                patch.setattr(writer.PartFile, "append", _fail_to_append)
            else:
                stream = _UnreadableStream()
        try:
            compute_features(folder, wanted, stream, encoder, grid, batch_size=3)
        except DataError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_cannot_open_read_or_write_leaves_no_other_waiting(
    tmp_path: Path, ranks: int, distributed: Distributed
) -> None:
    reasons = {"opening": "Too many open files", "reading": "Input", "appending": "No space left"}
    for where, reason in reasons.items():
        folder = tmp_path / where
        errors = distributed(ranks, _fail_on_rank, 0, folder, where, 2, timeout=240)
        assert all(reason in error for error in errors), errors
        assert not (folder / "features-00000.npy").exists()


def test_no_part_is_published_that_another_rank_of_the_group_could_not_read_the_inputs_of(
    tmp_path: Path, distributed: Distributed
) -> None:
    """It has the shape of a part: the next start would take it for one."""
    writing, failing = distributed(2, _fail_on_rank, 1, tmp_path, "reading", 2, timeout=240)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert failing == f"{tmp_path}: its inputs cannot be read ([Errno 5] Input/output error)"
    assert writing == f"rank 1: {failing}"


def _count_looks(folder: Path) -> list[str]:
    """What this rank looked at in the folder before the store was there."""
    grid, seen = grid_for(1), []
    exists, problem = FeatureStore.exists, writer.part_problem

    def counting_exists(folder: Path) -> bool:
        found = exists(folder)
        seen.extend([] if found else ["folder"])
        return found

    def counting_problem(folder: Path, spec: FeatureSpec, array: str, part: int) -> str | None:
        seen.append(f"part {part}")
        return problem(folder, spec, array, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "exists", counting_exists)
        patch.setattr(writer, "part_problem", counting_problem)
        compute_features(folder, spec(), Stream(), encode, grid, batch_size=3)
    return seen


def test_one_rank_alone_looks_for_what_is_there_already(
    tmp_path: Path, distributed: Distributed
) -> None:
    """The others would only load the file system, and remember files as absent that then come."""
    first, second = distributed(2, _count_looks, tmp_path)
    assert first == ["folder", "part 0", "part 1", "part 2"]
    assert second == []


def _write_other_text(folder: Path) -> str:
    grid = grid_for(1)
    own = spec(shards="st"[grid.rank] * 64, dtype=("float32", "bfloat16")[grid.rank])
    try:
        compute_features(folder, own, Stream(), encode, grid, batch_size=3)
    except DataError as error:
        return str(error)
    return "no error"


def test_ranks_of_other_texts_or_types_write_nothing(
    tmp_path: Path, distributed: Distributed
) -> None:
    for error in distributed(2, _write_other_text, tmp_path / "store"):
        assert "shards is ssssssssssss... on rank 0 and tttttttttttt... on rank 1" in error
        assert "dtype is float32 on rank 0 and bfloat16 on rank 1" in error
    assert not (tmp_path / "store").exists()


def _open_again(folder: Path) -> str:
    try:
        compute_features(folder, spec(), Stream(), encode, grid_for(1), batch_size=3)
    except DataError as error:
        return str(error)
    return "no error"


def test_ranks_verify_a_store_in_shares_and_all_learn_of_a_damaged_part(
    tmp_path: Path, distributed: Distributed
) -> None:
    assert distributed(2, _open_again, tmp_path) == ["no error"] * 2
    part = tmp_path / "features-00001.npy"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    first, second = distributed(2, _open_again, tmp_path)
    assert first == f"rank 1: {second}"
    assert "features-00001.npy: damaged" in second
