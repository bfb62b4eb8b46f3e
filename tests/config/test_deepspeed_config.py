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
    options = _generate(
        {"zero_optimization": {"allgather_partitions": False}, "prescale_gradients": True}
    )
    assert options["zero_optimization"]["allgather_partitions"] is False
    assert options["zero_optimization"]["stage"] == 2
    assert options["prescale_gradients"] is True


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
        (
            {"zero_optimization": {"reduce_scater": False}},
            "; did you mean deepspeed.zero_optimization.reduce_scatter?",
        ),
        ({"zero_optimization": {"reduce_scatter": 3}}, "reduce_scatter: Input should be a valid"),
        ({"zero_optimization": None}, "DeepSpeed refuses"),
        ({"fp16": {"initial_scale_power": "much"}}, "initial_scale_power: Input should be a valid"),
        ({"communication_data_type": "fp12"}, "Invalid communication_data_type"),
        ({"timers": 3}, "DeepSpeed refuses"),
        ({"nosuch": 1}, "deepspeed.nosuch is no key of DeepSpeed"),
        ({"seed": 1}, "; did you mean training.seed or generation.seed?"),
        ({"prescale": True}, "; did you mean deepspeed.prescale_gradients?"),
        ({"aio": {"block_siz": 1}}, "; did you mean deepspeed.aio.block_size?"),
        ({"csv_monitor": {"job_nam": ""}}, "; did you mean deepspeed.csv_monitor.job_name?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "; did you mean training.precision?"),
    ],
)
def test_what_deepspeed_does_not_accept_is_one_line(raw: dict[str, Any], expected: str) -> None:
    check_accepted(_generate({}))
    with pytest.raises(ConfigError) as caught:
        check_accepted(_generate(raw))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        {"zero_optimization": {"ignore_unused_parameters": True, "elastic_checkpoint": False}},
        {"zero_optimization": {"parameter_alignment": False, "compute_grad_norm": True}},
        {"fp16": {"initial_scale_power": 8, "loss_scale_window": 9, "hysteresis": 2}},
        {"communication_data_type": "fp16", "gradient_predivide_factor": 2.0},
        {"wall_clock_breakdown": True, "memory_breakdown": False, "dump_state": False},
        {"timers": {"throughput": {"enabled": True, "synchronized": False}}},
        {"flops_profiler": {"enabled": True, "profile_step": 5, "top_modules": 1}},
        {"comms_logger": {"enabled": True, "prof_all": True, "debug": False}},
        {"csv_monitor": {"enabled": False, "output_path": "x", "job_name": "y"}},
        {"aio": {"block_size": 1048576, "queue_depth": 8}, "compile": {"deepcompile": False}},
        {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
        {"disable_allgather": False, "log_level": "warning", "data_types": {}},
    ],
)
def test_keys_that_deepspeed_reads_pass(raw: dict[str, Any]) -> None:
    check_accepted(_generate(raw))


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("fp16", 1)])
def test_half_precision_shards_its_master_weights(precision: str, stage: int) -> None:
    options = _generate({}, precision, parallel={"zero_stage": 0})
    assert options["zero_optimization"]["stage"] == stage
