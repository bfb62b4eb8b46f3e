"""The generated DeepSpeed configuration and what users may add to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megaegpt.errors import ConfigError
from megaegpt.training.engine.deepspeed_config import deepspeed_config
from tests.training.runs import run_config


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


def test_a_raw_key_that_repeats_ours_is_accepted() -> None:
    assert _generate({"gradient_clipping": 0.05, "train_batch_size": 8})["train_batch_size"] == 8


def test_contradictions_are_reported_together_with_their_owners() -> None:
    raw = {"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0, "optimizer": {"type": "X"}}
    with pytest.raises(ConfigError) as caught:
        _generate(raw)
    message = str(caught.value)
    for part in ("zero_optimization.stage=3", "parallel.zero_stage", "gradient_clipping=2.0"):
        assert part in message
    assert "deepspeed.optimizer" in message


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("fp16", 1)])
def test_half_precision_shards_its_master_weights(precision: str, stage: int) -> None:
    options = _generate({}, precision, parallel={"zero_stage": 0})
    assert options["zero_optimization"]["stage"] == stage
