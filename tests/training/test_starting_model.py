"""Where the model of a run is before its first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.starting_model import starting_model
from tests.tiny.engines import run_config


@pytest.mark.parametrize(("stage", "place"), [(2, "meta"), (3, "cpu")])
def test_a_device_gets_no_whole_model_that_is_cut_over_the_ranks(stage: Any, place: str) -> None:
    """A device without memory stands in for one with too little."""
    config = run_config(parallel={"zero_stage": stage})
    grid = dataclasses.replace(ProcessGrid(), device=torch.device("meta"))
    model = starting_model(config, grid, None, None, compiles=False, notices=[], new=True)
    assert {parameter.device.type for parameter in model.parameters()} == {place}
