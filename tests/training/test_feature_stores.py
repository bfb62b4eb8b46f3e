"""A run's feature stores: one process at a time writes one, and any number read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import FolderInUseError
from megaegpt.files import LOCK, locked_folder
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training import run_lock
from megaegpt.training.feature_stores import prepare_store
from tests.tiny.runs import corpus, run_config

__all__ = ["corpus"]


def test_a_store_that_another_process_writes_is_not_written_too_and_a_complete_one_is_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "WAIT_S", 0.0)
    config = run_config("egpt", corpus, tmp_path, data={"features": str(tmp_path / "store")})
    grid = ProcessGrid()
    encoder = FrozenEncoder.from_source(config.model.encoder, grid)
    stream = TokenStream(config.data.validation)
    folder = tmp_path / "store" / "validation"
    folder.mkdir(parents=True)
    for complete in (False, True):
        with locked_folder(folder):
            if complete:
                prepare_store(config, grid, encoder, stream, "validation", "fp32")
                continue
            with pytest.raises(FolderInUseError, match=r"another run \(process .*let it end, its"):
                prepare_store(config, grid, encoder, stream, "validation", "fp32")
            assert [path.name for path in folder.iterdir()] == [LOCK]
        prepare_store(config, grid, encoder, stream, "validation", "fp32")
