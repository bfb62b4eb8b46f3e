"""Runs of an earlier version of this program go on with the losses that they would have had."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from megaegpt.config.loading import load_config
from megaegpt.training.pretraining import pretrain
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.runs import records

_FOLDER = Path(__file__).parents[1] / "data_files" / "earlier_runs"


def _resume(kind: str, folder: Path) -> str:
    with tarfile.open(_FOLDER / "runs.tar.gz") as archive:
        archive.extractall(folder)  # ours: Python 3.11.2 has no filters
    runs = folder / "runs"
    places = [
        f"data.train={runs}/train",
        f"data.validation={runs}/validation",
        f"checkpoint.directory={runs}/{kind}/checkpoints",
        f"logging.directory={runs}/{kind}",
    ]
    if kind == "egpt":
        places.append(f"model.encoder.source={runs}/encoder")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert pretrain(load_config(runs / f"{kind}.yaml", places), grid_for(1), resume=True)
    return shown.getvalue()


@pytest.mark.parametrize("kind", ["gpt", "egpt"])
def test_a_run_of_an_earlier_version_goes_on_as_if_it_had_not_been_interrupted(
    kind: str, tmp_path: Path, distributed: Distributed
) -> None:
    (shown,) = distributed(1, _resume, kind, tmp_path)
    assert "resuming after step 2" in shown
    assert "features of" not in shown, "its feature stores are taken as they are"
    folder = tmp_path / "runs" / kind
    for name, expected in json.loads((_FOLDER / "expected.json").read_text())[kind].items():
        found = {str(r["step"]): r[name] for r in records(folder) if name in r}
        assert found == pytest.approx(expected, rel=1e-5), name
