"""Files of tensors that are not what they seem are refused, quickly, and nothing of them is run."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megaegpt.errors import CheckpointError
from megaegpt.interop.tensor_files import open_tensors

PICKLED, INDEX = "pytorch_model.bin", "model.safetensors.index.json"


def _pickled(folder: Path, content: Any, *, archive: bool = True) -> Path:
    torch.save(content, folder / PICKLED, _use_new_zipfile_serialization=archive)
    return folder


@pytest.mark.parametrize("archive", [True, False])
def test_a_training_scripts_checkpoint_is_read_by_its_state_dict(
    tmp_path: Path, archive: bool
) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    _pickled(tmp_path, {"state_dict": {"x": weight}, "epoch": 3}, archive=archive)
    assert torch.equal(open_tensors(tmp_path)["x"].read(), weight)


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("archive", [True, False])
def test_what_would_run_code_is_refused_in_both_of_torchs_formats(
    tmp_path: Path, archive: bool
) -> None:
    _pickled(tmp_path, {"x": _Payload(tmp_path / "mark")}, archive=archive)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or unsafe"):
        open_tensors(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_a_compressed_archive_is_not_unfolded(tmp_path: Path) -> None:
    _pickled(tmp_path, {"x": torch.zeros(2**20)})
    small = tmp_path / "small"
    small.mkdir()
    with (
        zipfile.ZipFile(tmp_path / PICKLED) as whole,
        zipfile.ZipFile(small / PICKLED, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in whole.infolist():
            archive.writestr(entry.filename, whole.read(entry))
    assert (small / PICKLED).stat().st_size < 2**14
    with pytest.raises(CheckpointError, match="is compressed, which torch"):
        open_tensors(small)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x": torch.zeros(1).expand(2**40)}, r"x claims shape \(1099511627776,\), more than"),
        ({"x": torch.eye(3).to_sparse()}, "x is no plain tensor"),
        ({"x": torch.zeros(3, device="meta")}, "x is no plain tensor"),
        ({"x": [1, 2]}, "x is no tensor, but a list"),
        ({1: torch.zeros(3)}, "holds no tensors by name, but a dict"),
        (torch.zeros(3), "holds no tensors by name, but a Tensor"),
    ],
)
def test_what_is_no_tensor_with_its_values_is_named(
    tmp_path: Path, archive: bool, content: Any, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_tensors(_pickled(tmp_path, content, archive=archive))


def test_other_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / PICKLED).write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or unsafe"):
        open_tensors(tmp_path)


def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path) -> None:
    for name in (PICKLED, "model.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
        with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
            open_tensors(tmp_path)


# -- several files --------------------------------------------------------------------------------


def _indexed(folder: Path, index: object, **files: str) -> Path:
    """Files of one tensor each, whose name is given, and an index."""
    for file, tensor in files.items():
        save_file({tensor: torch.zeros(2)}, folder / f"{file}.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", ".."]
)
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, place: object) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "theirs"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"x is said to be in .* no file of this folder"):
        open_tensors(_indexed(folder, {"weight_map": {"x": place}}, b="x", outside="x"))


@pytest.mark.parametrize(
    "index",
    [[], 3, None, {}]
    + [{"weight_map": places} for places in (None, [1], {}, {"x": 3}, {"x": None}, {"x": ["a"]})],
)
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: object) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_tensors(_indexed(tmp_path, index))


def test_files_hold_what_their_index_says(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing"):
        open_tensors(_indexed(tmp_path, index, b="y"))
    with pytest.raises(CheckpointError, match=r"a\.safetensors lacks x"):
        open_tensors(_indexed(tmp_path, index, a="z"))
    with pytest.raises(CheckpointError, match="y is both in"):
        open_tensors(_indexed(tmp_path, index, a="y"))
    assert open_tensors(_indexed(tmp_path, index, a="x")).keys() == {"x", "y"}
