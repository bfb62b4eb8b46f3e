"""The generated DeepSpeed configuration and what users may add to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megaegpt.config.deepspeed_config import deepspeed_config
from megaegpt.errors import ConfigError
from megaegpt.training.engine.compat import check_accepted
from tests.tiny.engines import run_config


def _generate(raw: dict[str, Any], precision: Any = "fp32", **changes: Any) -> dict[str, Any]:
    config = dataclasses.replace(run_config(**changes), deepspeed=raw)
    return deepspeed_config(config, 2, precision, parameters=1001)


def test_batch_sizes_agree_and_buffers_are_no_larger_than_the_model() -> None:
    options = _generate({})
    assert options["train_batch_size"] == 8
    assert options["train_micro_batch_size_per_gpu"] * options["gradient_accumulation_steps"] == 4
    assert options["zero_optimization"]["reduce_bucket_size"] == 1002


def test_clipping_is_always_explicit() -> None:
    off = {"training": {"gradient_clipping": 0.0}}
    assert _generate({})["gradient_clipping"] == 0.05
    assert _generate({}, **off)["gradient_clipping"] == 0.0
    assert _generate({}, parallel={"zero_stage": 0})["gradient_clipping"] == 0.0, "ours clips"


def test_raw_keys_are_merged_beside_the_generated_ones() -> None:
    options = _generate({"zero_optimization": {"round_robin_gradients": True}, "prescale": 1})
    assert options["zero_optimization"]["round_robin_gradients"] is True
    assert options["zero_optimization"]["stage"] == 2
    assert options["prescale"] == 1


@pytest.mark.parametrize(
    ("raw", "divides_first"),
    [
        ({}, True),
        ({"zero_optimization": {"reduce_scatter": True}}, False),
        ({"gradient_predivide_factor": 2.0}, False),
        ({"prescale_gradients": False}, False),
    ],
)
def test_gradients_are_divided_before_they_are_summed_where_that_is_possible(
    raw: dict[str, Any], divides_first: bool
) -> None:
    options = _generate(raw)
    scatters = "zero_optimization" in raw
    assert options["zero_optimization"]["reduce_scatter"] is scatters
    assert options["prescale_gradients"] is divides_first
    check_accepted(options)


@pytest.mark.parametrize(
    ("overlap", "parameters", "bucket"),
    [(False, 124_000_000, 124_000_000), (True, 124_000_000, 25_000_000), (True, 1001, 1002)],
)
def test_overlapped_reduction_has_buckets_that_a_backward_pass_fills_several_times(
    overlap: bool, parameters: int, bucket: int
) -> None:
    config = run_config(parallel={"overlap_comm": overlap})
    options = deepspeed_config(config, 2, "bf16", parameters)["zero_optimization"]
    assert options["reduce_bucket_size"] == options["allgather_bucket_size"] == bucket


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"zero_optimization": {"reduce_scater": False}}, "reduce_scater: Extra inputs are not"),
        ({"zero_optimization": {"reduce_scatter": 3}}, "reduce_scatter: Input should be a valid"),
        ({"zero_optimization": None}, "DeepSpeed refuses"),
        ({"fp16": {"initial_scale_power": "much"}}, "initial_scale_power: Input should be a valid"),
        ({"communication_data_type": "fp12"}, "Invalid communication_data_type"),
        ({"timers": 3}, "DeepSpeed refuses"),
    ],
)
def test_what_deepspeed_does_not_accept_is_one_line(raw: dict[str, Any], expected: str) -> None:
    check_accepted(_generate({}))
    with pytest.raises(ConfigError) as caught:
        check_accepted(_generate(raw))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("fp16", 1)])
def test_half_precision_shards_its_master_weights(precision: str, stage: int) -> None:
    options = _generate({}, precision, parallel={"zero_stage": 0})
    assert options["zero_optimization"]["stage"] == stage
