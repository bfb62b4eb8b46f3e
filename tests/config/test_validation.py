"""Combinations of values that cannot be run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megaegpt.config import BatchRampConfig, EGPTConfig, ModelConfig, RopeScalingConfig, RunConfig
from megaegpt.config.loading import validate
from megaegpt.config.training import OptimizerConfig, ProfileConfig
from megaegpt.errors import ConfigError


def run_config(**sections: dict[str, Any]) -> RunConfig:
    """The default run with some fields replaced: ``run_config(model={"num_heads": 4})``."""
    default = RunConfig()
    replaced = {
        name: dataclasses.replace(getattr(default, name), **values)
        for name, values in sections.items()
        if name != "deepspeed"
    }
    return dataclasses.replace(default, deepspeed=sections.get("deepspeed", {}), **replaced)


def test_a_task_can_decide_what_is_best_without_a_validation_split() -> None:
    data = {"train": ("x",), "tasks": ("words=x.jsonl",)}
    validate(run_config(data=data, checkpoint={"keep_best": True, "best_of": "words"}))
    with pytest.raises(ConfigError, match="keep_best=true needs"):
        validate(run_config(data=data, checkpoint={"keep_best": True}))


REFUSED = [
    ({"model": {"hidden_size": 100}}, "hidden_size=100 is not divisible by model.num_heads=12"),
    ({"model": {"num_kv_heads": 5}}, "model.num_kv_heads=5: use one of 1, 2, 3, 4, 6, 12"),
    (
        {"model": {"num_kv_heads": 3}, "parallel": {"tensor_parallel_size": 2}},
        "model.num_kv_heads=3 and parallel.tensor_parallel_size=2: one must divide the other",
    ),
    ({"parallel": {"tensor_parallel_size": 8}}, "model.num_heads=12 is not divisible by"),
    (
        {"model": {"ffn_hidden_size": 6}, "parallel": {"tensor_parallel_size": 4}},
        "model.ffn_hidden_size=6 is not divisible by parallel.tensor_parallel_size=4",
    ),
    (
        {"model": {"num_heads": 5, "hidden_size": 320}, "parallel": {"tensor_parallel_size": 5}},
        "model.vocab_size=50257, padded to 50304, is not divisible by",
    ),
    ({"training": {"micro_batch_size": 3}}, "use for example 9"),
    ({"training": {"batch_ramp": BatchRampConfig(0)}}, "batch_ramp.start=0 must be greater than 0"),
    ({"training": {"batch_ramp": BatchRampConfig(8)}}, "batch_ramp.start=8 must be below"),
    ({"training": {"batch_ramp": BatchRampConfig(None, 4)}}, "no effect without training.batch_"),
    (
        {"training": {"batch_ramp": BatchRampConfig(3, 2), "micro_batch_size": 2}},
        "training.batch_ramp.start=3 is not divisible by 2, the samples of a micro-step: use",
    ),
    (
        {"training": {"batch_ramp": BatchRampConfig(4, 1), "micro_batch_size": 4}},
        "training.batch_ramp.increment=1 is not divisible by 4",
    ),
    (
        {"training": {"batch_ramp": BatchRampConfig(4, 1, 250)}},
        "takes 1000 steps, training.steps=1000: global_batch_size=8 is never reached",
    ),
    (
        {"model": {"positions": "rotary", "head_dim": 5}},
        "rope_fraction=1.0 of the head width 5 must be an even number, not 5",
    ),
    (
        {"model": {"positions": "rotary", "rope_fraction": 0.01}},
        "of the head width 64 must be an even number, not 0",
    ),
    ({"model": {"rope_fraction": 0.5}}, "rope_fraction=0.5 has no effect without"),
    (
        {"model": {"rope_scaling": RopeScalingConfig("yarn", 2.0)}},
        "rope_scaling.kind=yarn has no effect without model.positions=rotary",
    ),
    (
        {"model": {"positions": "rotary", "rope_scaling": RopeScalingConfig(factor=2.0)}},
        "rope_scaling.factor=2.0 has no effect without model.rope_scaling.kind",
    ),
    (
        {
            "model": {
                "positions": "rotary",
                "rope_base": 1.0,
                "rope_scaling": RopeScalingConfig("yarn", 4.0),
            }
        },
        "rope_scaling.kind=yarn divides the frequencies of slow pairs: model.rope_base=1.0 must be",
    ),
    (
        {"model": {"positions": "rotary", "rope_scaling": RopeScalingConfig("ntk", 1e300)}},
        "model.rope_scaling.factor=1e+300 must be from 1e-30 to 1e+30",
    ),
    (
        {
            "model": {
                "positions": "rotary",
                "rope_scaling": RopeScalingConfig("yarn", 4.0, beta_fast=1e308),
            }
        },
        "model.rope_scaling.beta_fast=1e+308 must be from 1e-30 to 1e+30",
    ),
    (
        {"model": {"attention": "latent", "qk_norm": "head"}},
        "qk_norm=head cannot be combined with model.attention=latent",
    ),
    (
        {"model": {"attention": "latent", "qkv_bias": False}},
        "qkv_bias=false has no effect with model.attention=latent",
    ),
    ({"model": {"positions": "sinusoidal", "hidden_size": 3, "num_heads": 1}}, "needs an even"),
    ({"model": {"attention": "latent", "positions": "rotary"}}, "needs an even model.rope_head"),
    ({"model": {"rope_head_dim": 8}}, "model.rope_head_dim=8 has no effect"),
    ({"model": {"latent_dim": 8}}, "model.latent_dim=8 has no effect without"),
    ({"model": {"latent_norm": False}}, "latent_norm=false has no effect without"),
    ({"model": {"attention": "latent", "num_kv_heads": 2}}, "num_kv_heads=2 has no effect"),
    ({"model": {"attention": "latent", "window": 8}}, "cannot be combined with"),
    ({"model": {"window_every": 2}}, "model.window_every=2 has no effect without model.window"),
    ({"model": {"window": 0}}, "model.window=0 must be greater than 0"),
    ({"training": {"freeze": ("layers:12",)}}, "'layers:12': the model has layers 0 to 11"),
    ({"training": {"freeze": ("layers:3-1",)}}, "'layers:3-1': the first layer comes after"),
    ({"training": {"freeze": ("layer.3",)}}, "'layer.3' is none of layers:N and layers:FIRST-LAST"),
    ({"training": {"patience": 0}}, "training.patience=0 must be greater than 0"),
    (
        {"training": {"patience": 2}, "data": {"train": ("x",)}},
        "training.patience=2 needs data.validation",
    ),
    (
        {"checkpoint": {"keep_best": True}, "data": {"train": ("x",)}},
        "checkpoint.keep_best=true needs data.validation",
    ),
    ({"data": {"validation_sets": ("data/x",)}}, "'data/x' must be NAME=PREFIX"),
    (
        {"data": {"validation_sets": ("x=$NO_SUCH_VARIABLE/x",)}},
        "the environment variable $NO_SUCH_VARIABLE is not set",
    ),
    ({"data": {"validation_sets": ("train=data/x",)}}, "'train' has a meaning already"),
    (
        {"data": {"train": ("x",), "validation_sets": ("wiki=data/x",)}},
        "stand beside data.validation, which is empty",
    ),
    (
        {"checkpoint": {"best_of": "code"}, "data": {"validation_sets": ("wiki=data/x",)}},
        "best_of=code is no validation set or task: use one of validation, wiki",
    ),
    (
        {"logging": {"profile": ProfileConfig(start=1001)}},
        "profile.start=1001 is after the last step, training.steps=1000",
    ),
    ({"data": {"tasks": ("lambada.jsonl",)}}, "data.tasks: 'lambada.jsonl' must be NAME=FILE"),
    ({"data": {"tasks": ("a=x", "a=y")}}, "data.tasks: 'a' is there twice"),
    ({"data": {"tasks": ("wiki=x",), "validation_sets": ("wiki=y",)}}, "'wiki' is there twice"),
    ({"data": {"tasks": ("validation=x",)}}, "'validation' has a meaning already"),
    ({"data": {"tasks": ("a=$NO_SUCH_VARIABLE/x",)}}, "$NO_SUCH_VARIABLE is not set"),
    ({"model": {"dropout": 1.0}}, "model.dropout=1.0 must be at least 0 and below 1"),
    ({"model": {"kind": "egpt"}}, "model.encoder.source is required for model.kind=egpt"),
    ({"model": {"kind": "deepgpt"}}, "model.encoder.source is required for model.kind=deepgpt"),
    ({"training": {"steps": 20}}, "training.steps=20 must be greater than optimizer.warmup_steps"),
    ({"optimizer": {"decay_steps": 9}}, "optimizer.decay_steps=9 must be greater than"),
    ({"optimizer": {"schedule": "wsd", "decay_steps": 990}}, "do not fit in training.steps=1000"),
    ({"data": {"train": ("a", "b"), "weights": (1.0,)}}, "must be one number for each of the 2 "),
    (
        {"data": {"train": ("a", "b"), "weights": (1.0, 0.0)}},
        "weights=[1.0, 0.0] must be greater than 0",
    ),
    (
        {"parallel": {"zero_stage": 3}, "optimizer": {"kind": "muon"}},
        "parallel.zero_stage=3 leaves parts to each rank: use zero_stage=2, or adamw",
    ),
    (
        {"parallel": {"zero_stage": 2, "offload": "optimizer"}},
        "parallel.offload=optimizer needs parallel.zero_stage=3, not 2",
    ),
    (
        {"parallel": {"zero_stage": 3}, "training": {"compile": True}},
        "parallel.zero_stage=3 gathers parameters: use zero_stage=2, or compile=false",
    ),
    ({"optimizer": {"momentum": 0.9}}, "momentum=0.9 has no effect without optimizer.kind=muon"),
    ({"optimizer": {"min_lr": 1.0}}, "optimizer.min_lr=1.0 must not be above optimizer.lr"),
    ({"training": {"micro_batch_size": 0}}, "training.micro_batch_size=0 must be greater than 0"),
    (
        {"training": {"micro_batch_size": "auto", "batch_ramp": BatchRampConfig(9, 2)}},
        "training.batch_ramp.start=9 must be below",
    ),
    ({"optimizer": {"weight_decay": -0.1}}, "optimizer.weight_decay=-0.1 must not be negative"),
    ({"generation": {"top_p": 1.5}}, "generation.top_p=1.5 must be above 0, at most 1"),
]


def test_where_no_rate_falls_the_lowest_is_not_asked_for() -> None:
    validate(RunConfig(optimizer=OptimizerConfig(lr=1e-5, schedule="constant", warmup_steps=0)))


@pytest.mark.parametrize(("sections", "expected"), REFUSED)
def test_a_combination_that_cannot_run_is_refused(sections, expected):
    with pytest.raises(ConfigError) as caught:
        validate(run_config(**sections))
    assert expected in str(caught.value)


ALLOWED = [
    {"model": {"num_kv_heads": 1}, "parallel": {"tensor_parallel_size": 4}},
    {"model": {"num_kv_heads": 6}, "parallel": {"tensor_parallel_size": 3}},
    {"model": {"hidden_size": 100, "head_dim": 8}},
    {"model": {"attention": "latent", "positions": "rotary", "rope_head_dim": 32}},
    {"model": {"window": 128, "window_every": 4}},
    {"optimizer": {"schedule": "wsd", "decay_steps": 980}},
    {"optimizer": {"schedule": "constant"}, "training": {"steps": 5}},
    {"deepspeed": {"fp16": {"initial_scale_power": 12}, "wall_clock_breakdown": True}},
]


@pytest.mark.parametrize("sections", ALLOWED)
def test_a_combination_that_can_run_is_accepted(sections):
    validate(run_config(**sections))


@pytest.mark.parametrize(
    ("batch", "micro", "tp", "world", "fits"),
    [(8, 1, 1, 8, True), (8, 2, 1, 8, False), (8, 2, 2, 8, True), (12, 1, 1, 8, False)],
)
def test_the_global_batch_divides_over_the_ranks_of_the_run(batch, micro, tp, world, fits):
    config = run_config(
        training={"global_batch_size": batch, "micro_batch_size": micro},
        parallel={"tensor_parallel_size": tp},
    )
    validate(config)
    if fits:
        validate(config, world)
    else:
        with pytest.raises(ConfigError, match=f"training.global_batch_size={batch}"):
            validate(config, world)


def test_an_automatic_micro_batch_needs_a_batch_that_the_ranks_divide():
    config = run_config(training={"global_batch_size": 6, "micro_batch_size": "auto"})
    validate(config, 3)
    with pytest.raises(ConfigError, match="is not divisible by 4 data-parallel ranks: use for exa"):
        validate(config, 4)


def test_processes_that_do_not_divide_into_tensor_parallel_groups_are_refused():
    config = run_config(parallel={"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match="3 processes are not divisible by"):
        validate(config, 3)


def test_processes_that_do_not_divide_into_those_that_share_samples_are_refused():
    config = run_config(parallel={"tensor_parallel_size": 2, "context_parallel_size": 2})
    sizes = "parallel.tensor_parallel_size=2 x parallel.context_parallel_size=2"
    with pytest.raises(ConfigError, match=f"6 processes are not divisible by {sizes}"):
        validate(config, 6)


@pytest.mark.parametrize("kind", ["egpt", "deepgpt"])
def test_chunks_of_which_context_parallel_ranks_cannot_have_as_many_are_refused(kind):
    config = run_config(
        model={"kind": kind, "egpt": EGPTConfig(num_chunks=6)},
        parallel={"context_parallel_size": 4},
    )
    with pytest.raises(ConfigError, match=r"num_chunks=6 is not divisible.*for example 8"):
        validate(config)


def test_a_model_rule_is_not_judged_on_a_size_of_zero():
    config = run_config(model={"num_heads": 0}, parallel={"tensor_parallel_size": 0})
    with pytest.raises(ConfigError) as caught:
        validate(config, 2)
    assert "2 problems" in str(caught.value)


def test_defaults_of_sizes_resolve():
    model = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=2)
    assert (model.kv_heads, model.head_size, model.ffn_size, model.latent_size) == (2, 16, 256, 8)
    assert model.padded_vocab_size == 50304
