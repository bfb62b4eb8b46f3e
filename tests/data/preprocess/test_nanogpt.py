"""nanoGPT's token files become shards without a change to their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaegpt.data.preprocess import nanogpt
from megaegpt.data.tokens.corpus_manifest import Manifest
from megaegpt.data.tokens.shards import Shard
from megaegpt.errors import DataError
from megaegpt.files import LFS_POINTER, locked_folder


@pytest.mark.parametrize("block", [3, 8, 1 << 22])
@pytest.mark.parametrize("ended", [True, False])
def test_tokens_and_documents_come_back(
    tmp_path: Path, block: int, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanogpt, "BLOCK_TOKENS", block)
    documents = [[1, 2, 50256], [50256], [*range(30), 50256], [7, 50256 if ended else 8]]
    tokens = np.array([token for document in documents for token in document], "<u2")
    tokens.tofile(tmp_path / "train.bin")
    tokens[:3].tofile(tmp_path / "val.bin")
    nanogpt.import_files([tmp_path / "train.bin", tmp_path / "val.bin"], tmp_path / "out")
    shard = Shard(tmp_path / "out" / "train")
    shard.verify(50257)
    assert [shard.document(n).tolist() for n in range(shard.num_documents)] == documents
    assert (tmp_path / "out" / "train.bin").read_bytes() == tokens.tobytes()
    assert Shard(tmp_path / "out" / "validation").tokens.tolist() == [1, 2, 50256]
    Manifest.load(tmp_path / "out").verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"abc", "has 3 bytes"),
        (np.array([1, 50257], "<u2").tobytes(), "holds id 50257"),
    ],
)
def test_what_is_no_token_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        nanogpt.import_files([tmp_path / "train.bin"], tmp_path / "out")
    with pytest.raises(DataError, match="would be overwritten"):
        nanogpt.import_files([tmp_path / "train.bin"], tmp_path)
    with pytest.raises(DataError, match=r"none\.bin is not a token file"):
        nanogpt.import_files([tmp_path / "none.bin"], tmp_path / "out")


def token_file(path: Path, tokens: list[int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    np.array(tokens, "<u2").tofile(path)
    return path


def test_two_token_files_of_one_split_are_refused(tmp_path: Path) -> None:
    first = token_file(tmp_path / "a" / "train.bin", [1, 50256])
    second = token_file(tmp_path / "b" / "train.bin", [2, 50256])
    with pytest.raises(DataError, match=rf"{first} and {second} would both be the split train"):
        nanogpt.import_files([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_import_replaces_nothing_unasked(tmp_path: Path) -> None:
    first = token_file(tmp_path / "a" / "train.bin", [1, 50256])
    other = token_file(tmp_path / "b" / "train.bin", [2, 50256])
    output = tmp_path / "out"
    nanogpt.import_files([first], output)
    inode = (output / "train.bin").stat().st_ino
    nanogpt.import_files([first], output)
    assert (output / "train.bin").stat().st_ino == inode  # the same once more: nothing to do
    with pytest.raises(DataError, match=r"shards of other inputs or options: .*--overwrite"):
        nanogpt.import_files([other], output)
    assert Shard(output / "train").tokens.tolist() == [1, 50256]
    nanogpt.import_files([other], output, overwrite=True)
    assert Shard(output / "train").tokens.tolist() == [2, 50256]
    (output / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"train\.idx exists already"):
        nanogpt.import_files([first], output)


def test_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    good = token_file(tmp_path / "train.bin", [1, 50256])
    bad = token_file(tmp_path / "val.bin", [50257])
    with pytest.raises(DataError, match="holds id 50257"):
        nanogpt.import_files([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_import_overwrites_nothing(tmp_path: Path) -> None:
    good = token_file(tmp_path / "a" / "train.bin", [1, 50256])
    bad = token_file(tmp_path / "b" / "val.bin", [50257])
    output = tmp_path / "out"
    nanogpt.import_files([good], output)
    with pytest.raises(DataError, match="holds id 50257"):
        nanogpt.import_files([good, bad], output, overwrite=True)
    Manifest.load(output).verify(output)


def test_two_imports_do_not_write_into_one_folder(tmp_path: Path) -> None:
    file = token_file(tmp_path / "train.bin", [1, 50256])
    (tmp_path / "out").mkdir()
    with (
        locked_folder(tmp_path / "out"),
        pytest.raises(DataError, match="is being written by another run"),
    ):
        nanogpt.import_files([file], tmp_path / "out")


def test_what_looks_like_two_bytes_an_id_and_is_not_is_refused(tmp_path: Path) -> None:
    np.arange(1, 1000, dtype="<i4").tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="holds ids of 4 bytes"):
        nanogpt.import_files([tmp_path / "train.bin"], tmp_path / "out")
    (tmp_path / "train.bin").write_bytes(LFS_POINTER + b"v1")
    with pytest.raises(DataError, match="a Git LFS pointer"):
        nanogpt.import_files([tmp_path / "train.bin"], tmp_path / "out")
