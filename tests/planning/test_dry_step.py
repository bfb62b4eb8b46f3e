"""A micro-step on a device takes what the plan has for it; here a CPU is in the GPU's place."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig, ParallelConfig, TrainingConfig
from megaegpt.config.run import RunConfig
from megaegpt.planning.allocations import TensorMeter
from megaegpt.planning.dry_step import dry_step
from megaegpt.planning.memory import trace_rank

BESIDE = 1 << 20
ENCODER = ModelConfig(vocab_size=500, max_seq_len=20, hidden_size=64, num_layers=2, num_heads=4)


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's functions on a GPU's allocator, which is not here; it took 5 and then 12 bytes."""
    for name, result in {
        "memory_reserved": 5,
        "max_memory_reserved": 12,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


@pytest.mark.parametrize(
    ("model", "tp", "stage"),
    [
        ({}, 1, 1),
        ({}, 2, 2),
        ({"kind": "egpt", "egpt": EGPTConfig(3, 16)}, 1, 2),
        ({"kind": "egpt", "egpt": EGPTConfig(3, 16), "encoder": EncoderConfig(overlap=4)}, 1, 2),
    ],
    ids=["gpt", "tp2", "egpt", "overlap"],
)
@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_dry_step_is_the_traced_one_with_memory(
    model: dict[str, Any], tp: int, stage: Any
) -> None:
    sizes = {"vocab_size": 500, "max_seq_len": 48, "hidden_size": 64, "num_layers": 2}
    config = RunConfig(
        model=ModelConfig(**{**sizes, "num_heads": 4, **model}),
        parallel=ParallelConfig(tensor_parallel_size=tp, zero_stage=stage),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=4),
    )
    encoder = ENCODER if config.model.needs_encoder else None
    step = trace_rank(config, 1, "fp32", encoder, "cpu")
    planned = BESIDE + 4 * step.parameters + step.frozen + step.peak
    with TensorMeter() as meter:
        assert dry_step(config, 1, "fp32", encoder, torch.device("cpu"), BESIDE) == 7
    assert 0.97 < planned / meter.peak < 1.03
    assert meter.live < BESIDE  # nothing stays


@pytest.mark.usefixtures("cpu_as_gpu")
def test_the_type_of_new_tensors_is_afterwards_what_it_was() -> None:
    config = RunConfig(model=ENCODER, training=TrainingConfig(global_batch_size=1))
    dry_step(config, 1, "bf16", None, torch.device("cpu"), 1)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"
