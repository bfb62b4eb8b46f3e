"""Which pickled objects are read from a checkpoint, whatever Python wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from megaegpt.errors import CheckpointError
from megaegpt.training.checkpoint.deepspeed_state import loading


class _Asked:
    """Unpickling this asks an object for an attribute."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> Any:
        return getattr, (self.of, self.name)


def _read(folder: Path, stage: object) -> Any:
    torch.save({"zero_stage": stage}, folder / "state.pt")
    with loading(folder):
        return torch.load(folder / "state.pt", weights_only=False)["zero_stage"]


def test_a_stage_is_read_as_each_python_writes_it(tmp_path: Path) -> None:
    stage = ZeroStageEnum.gradients
    assert _read(tmp_path, stage) is stage
    assert _read(tmp_path, _Asked(ZeroStageEnum, "gradients")) is stage  # 3.11.2


@pytest.mark.parametrize(
    ("of", "name"), [(ZeroStageEnum, "__class__"), (torch.Tensor, "register_hook")]
)
def test_no_other_attribute_is_asked_for(tmp_path: Path, of: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        _read(tmp_path, _Asked(of, name))
