"""Copies of state from which files are written later."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

from megaegpt.training.checkpoint.host_copies import HostCopies


def _state() -> dict[str, Any]:
    flat = torch.arange(12.0)
    layer = nn.Linear(4, 2)
    layer.weight.data, layer.bias.data = flat[:8].view(2, 4), flat[8:10]
    module = layer.state_dict()
    module["alone"] = torch.ones(3).bfloat16()
    masters = nn.Parameter(torch.full((4,), 0.5))
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(0)}}}
    return {"module": module, "optimizer": optimizer, "parts": [masters, (flat[2:4], 7, "text")]}


def _bytes(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_a_file_of_the_copies_is_that_of_the_originals_whatever_becomes_of_them() -> None:
    state = _state()
    before = _bytes(state)
    copies = HostCopies()
    copied = copies.of(state)
    copies.release()
    for tensor in (*state["module"].values(), state["parts"][0]):
        tensor.data.zero_()
    state["optimizer"]["state"][0]["step"] += 1
    state["parts"].clear()
    assert _bytes(copied) == before
    assert _bytes(state) != before


def test_tensors_that_share_a_storage_share_its_copy() -> None:
    state = _state()
    copied = HostCopies().of(state)
    weight, bias = copied["module"]["weight"], copied["module"]["bias"]
    assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
    assert weight.untyped_storage().nbytes() == 12 * 4
    assert weight.data_ptr() != state["module"]["weight"].data_ptr()
    assert isinstance(copied["parts"][0], nn.Parameter)
