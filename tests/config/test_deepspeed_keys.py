"""Raw DeepSpeed keys: those that a run decides itself, or cannot do, are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from megaegpt.config import RunConfig
from megaegpt.config.deepspeed_config import deepspeed_config
from megaegpt.config.deepspeed_keys import OWNED_KEYS, deepspeed_problems
from megaegpt.config.metadata import annotations_of
from megaegpt.config.validation import validate
from megaegpt.errors import ConfigError


def _zero(**options: Any) -> dict[str, Any]:
    return {"zero_optimization": options}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled is set by training.precision: rem"),
        ({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer is set by optimizer: remove it"),
        ({"train_batch_size": 8}, "is set by training.global_batch_size"),
        ({"gradient_allreduce_op": "sum"}, "is set by the training loop"),
        ({"zero_optimization": None}, "deepspeed.zero_optimization must be a mapping of keys to"),
        (_zero(stage=2), "deepspeed.zero_optimization.stage is set by parallel.zero_stage"),
        (
            _zero(offload_optimizer={"device": "cpu"}),
            "offload_optimizer is set by parallel.offload",
        ),
        (_zero(offload_param={"device": "cpu"}), "offload_param is set by parallel.offload"),
        (_zero(memory_efficient_linear=True), "it has a wrong sum under"),
        (_zero(zero_quantized_weights=True), "checkpoints here know of one partition of each"),
        (_zero(zenflow={}), "it has an optimizer of its own, whose state checkpoints here do not"),
        (
            {"data_efficiency": {"enabled": True}},
            "DeepSpeed's data loader, which it is for, is not",
        ),
        ({"pipeline": {"seed_layers": True}}, "it is for DeepSpeed's pipeline engine"),
        (
            _zero(stage3_max_live_parameters=1),
            "it belongs to ZeRO stage 3: set parallel.zero_stage=3",
        ),
        (
            _zero(elastic_checkpoint=True),
            "elastic_checkpoint=true cannot be used: checkpoints here are brought to another",
        ),
        (_zero(compute_grad_norm=False), "=false cannot be used: every step's gradient norm is"),
        ({"fp16": {"loss_scale": 128}}, "=128 cannot be used: the loss scale follows the grad"),
        (_zero(reduce_bucket_size=-1), "reduce_bucket_size=-1 must be an integer greater than 0"),
        (_zero(reduce_bucket_size=0), "reduce_bucket_size=0 must be an integer greater than 0"),
        (_zero(allgather_bucket_size=1.5), "allgather_bucket_size=1.5 must be an integer greater"),
        (_zero(reduce_bucket_size="5e7"), "reduce_bucket_size=5e7 must be an integer greater"),
        (_zero(reduce_bucket_size=float("inf")), "reduce_bucket_size=inf must be an integer"),
    ],
)
def test_a_key_that_cannot_be_given_raw_is_one_line_with_the_reason(
    raw: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig(deepspeed=raw))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_only_deepspeed_has_may_be_given() -> None:
    raw = {
        "fp16": {"initial_scale_power": 12, "loss_scale": 0},
        "wall_clock_breakdown": True,
        **_zero(reduce_bucket_size=5e7, reduce_scatter=False, elastic_checkpoint=False),
    }
    assert not list(deepspeed_problems(raw, zero_stage=2))
    (problem,) = deepspeed_problems(_zero(round_robin_gradients=True), zero_stage=2)
    assert "an order that checkpoints here do not know" in problem.message
    assert not list(deepspeed_problems(_zero(stage3_max_live_parameters=1), zero_stage=3))


@pytest.mark.parametrize("key", ["max_live_parameters", "prefetch_bucket_size"])
@pytest.mark.parametrize("value", ["auto", "1e9", None, -1, 1.5, True])
def test_a_number_of_stage_3_that_is_none_is_one_line(key: str, value: Any) -> None:
    name = f"stage3_{key}"
    (problem,) = deepspeed_problems(_zero(**{name: value}), zero_stage=3)
    assert problem.message.endswith(f"{name}={value} must be an integer of at least 0")
    assert not list(deepspeed_problems(_zero(**{name: 0}), zero_stage=3))
    assert not list(deepspeed_problems(_zero(**{name: 1e9}), zero_stage=3))


def test_no_value_that_a_run_generates_from_its_own_keys_can_be_replaced() -> None:
    replaceable = {
        "prescale_gradients",
        "timers.throughput.enabled",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.contiguous_gradients",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.reduce_scatter",
    }
    generated = deepspeed_config(RunConfig(), 1, "fp32", parameters=1000)
    assert set(_leaves(generated)) - set(OWNED_KEYS) == replaceable


def test_the_owner_of_a_key_is_named_as_it_is_called_in_a_run() -> None:
    for key, owner in OWNED_KEYS.items():
        for name in owner.split(" and "):
            if name.startswith("the training loop"):
                continue
            section: Any = RunConfig
            for part in name.split("."):
                assert part in annotations_of(section), (key, owner)
                section = annotations_of(section)[part]


def _leaves(options: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in options.items():
        is_section = isinstance(value, dict)
        found += _leaves(value, f"{prefix}{key}.") if is_section else [f"{prefix}{key}"]
    return found
