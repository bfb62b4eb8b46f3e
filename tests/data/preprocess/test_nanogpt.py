"""nanoGPT's token files become shards without a change to their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaegpt.data.preprocess import nanogpt
from megaegpt.data.tokens.corpus_manifest import Manifest
from megaegpt.data.tokens.shards import Shard
from megaegpt.errors import DataError


@pytest.mark.parametrize("block", [3, 8, 1 << 22])
@pytest.mark.parametrize("ended", [True, False])
def test_tokens_and_documents_come_back(
    tmp_path: Path, block: int, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanogpt, "_BLOCK", block)
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
