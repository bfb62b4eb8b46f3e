"""The estimate of memory against what training really takes."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from megaegpt.config import (
    EGPTConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megaegpt.config.run import RunConfig
from megaegpt.model.build import build_inputs, build_model, meta_model
from megaegpt.model.parts import matrices_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.allocations import TensorMeter
from megaegpt.planning.memory import estimate_memory
from megaegpt.planning.memory_trace import trace_micro_step
from megaegpt.planning.muon_share import Matrix, share_of_muon
from megaegpt.planning.rank_check import as_rank
from megaegpt.training.engine.engine import Engine
from megaegpt.training.engine.muon import Muon, Piece
from tests.distributed.harness import Distributed, grid_for

LOW, HIGH = 0.95, 1.15
"""Estimate over measurement: it may err to the safe side, by the gradients of ZeRO 2 whose buckets
fill while activations are freed. With one data-parallel rank and full gradients it is exact."""


def run_config(
    dp: int,
    stage: int,
    precision: str,
    *,
    accumulation: int = 1,
    recompute: str = "none",
    micro_batch: int = 4,
    tp: int = 1,
    sequence: bool = False,
    cp: int = 1,
    optimizer: Literal["adamw", "muon"] = "adamw",
    **model: Any,
) -> RunConfig:
    sizes = {"vocab_size": 4000, "max_seq_len": 64, "hidden_size": 128, "num_layers": 3}
    return RunConfig(
        model=ModelConfig(**{**sizes, "num_heads": 4, **model}),
        parallel=ParallelConfig(
            zero_stage=stage,  # type: ignore[arg-type]
            tensor_parallel_size=tp,
            sequence_parallel=sequence,
            context_parallel_size=cp,
        ),
        training=TrainingConfig(
            steps=10,
            global_batch_size=micro_batch * accumulation * dp,
            micro_batch_size=micro_batch,
            precision=precision,  # type: ignore[arg-type]
            activation_checkpointing=recompute,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(kind=optimizer),
    )


def measured_peak(config: RunConfig, grid: ProcessGrid) -> int:
    """Most bytes of tensors in a step, after the optimizer's first, which has no moments yet."""
    model_config, training = config.model, config.training
    recompute = training.activation_checkpointing
    shape: tuple[int, ...] = (training.micro_batch_size, model_config.sample_len)
    if model_config.kind != "gpt":
        egpt = model_config.egpt
        shape = (training.micro_batch_size, egpt.num_chunks, egpt.chunk_size)
    batch = torch.zeros(shape, dtype=torch.int64)
    micro_batches = [{"tokens": batch, "targets": batch}] * config.gradient_accumulation(
        grid.dp_size
    )
    inputs = build_inputs(
        model_config,
        lambda tokens: torch.zeros(*tokens.shape, model_config.hidden_size),
        torch.float32,
    )
    gc.collect()
    with TensorMeter() as meter:
        model = build_model(
            model_config,
            grid,
            activation_checkpointing=recompute,
            sequence_parallel=config.parallel.sequence_parallel,
        )
        engine = Engine(model, grid, config, inputs.loss)
        for step in range(2):
            gc.collect()
            meter.reset_peak()
            engine.train_step(step, micro_batches)
    engine.close()
    return meter.peak


def measure(configs: list[RunConfig]) -> list[int]:
    """On a worker: the peak of each."""
    return [
        measured_peak(c, grid_for(p.tensor_parallel_size, p.context_parallel_size))
        for c in configs
        for p in (c.parallel,)
    ]


def assert_estimates(configs: list[RunConfig], dp: int, *measured: list[int]) -> None:
    """``measured``: by rank, then by configuration."""
    for config, *peaks in zip(configs, *measured, strict=True):
        precision = config.training.precision
        estimate = estimate_memory(config, dp, precision, device_type="cpu")  # type: ignore[arg-type]
        for peak in peaks:
            assert LOW < estimate.total / peak < HIGH, (config, estimate, peak)


@pytest.mark.long
def test_estimate_is_what_one_rank_takes(distributed: Distributed) -> None:
    configs = [
        run_config(1, 0, "fp32", accumulation=2),
        run_config(1, 1, "bf16"),
        run_config(1, 2, "fp32", accumulation=2),
        run_config(1, 2, "bf16", micro_batch=16),
        run_config(1, 2, "fp32", recompute="selective"),
        run_config(1, 2, "bf16", micro_batch=16, recompute="full"),
        run_config(1, 2, "fp32", micro_batch=8, num_kv_heads=1, positions="rotary", window=16),
        run_config(1, 0, "fp32", optimizer="muon"),
        run_config(1, 2, "fp32", micro_batch=1, optimizer="muon", vocab_size=500),
    ]
    assert_estimates(configs, 1, distributed(1, measure, configs)[0])


@pytest.mark.parametrize("memory", [False, True])
def test_estimate_is_what_an_egpt_takes(distributed: Distributed, memory: bool) -> None:
    """The mixture over tokens of earlier chunks is a part of the step."""
    chunks = EGPTConfig(num_chunks=4, chunk_size=32, token_memory=memory)
    config = run_config(
        1, 2, "fp32", kind="egpt", tied_embeddings=False, egpt=chunks, vocab_size=1000
    )
    assert_estimates([config], 1, distributed(1, measure, [config])[0])


def test_a_token_memorys_scores_are_those_that_the_device_has_at_once() -> None:
    """Half of a chunk's 1,024 x 4,096 on a CPU, all on a GPU."""
    chunks = EGPTConfig(num_chunks=4, chunk_size=1024, token_memory=True, memory_dim=8)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    config = run_config(1, 2, "fp32", micro_batch=2, kind="egpt", egpt=chunks, **sizes)
    on_cpu, on_gpu = (
        trace_micro_step(config, "fp32", None, device, False, fused_head=False, fused_blocks=False)
        for device in ("cpu", "cuda")
    )
    assert on_gpu.peak - on_cpu.peak > 4 * 2 * 512 * 4096


def _stage_3(precision: str, **options: int) -> RunConfig:
    """Of which all but norms and biases is cut."""
    zero = {"stage3_param_persistence_threshold": 1000, **options}
    config = run_config(2, 3, precision, accumulation=2)
    return dataclasses.replace(config, deepspeed={"zero_optimization": zero})


@pytest.mark.long
def test_estimate_is_what_data_parallel_ranks_take(distributed: Distributed) -> None:
    configs = [
        run_config(2, 1, "fp32", accumulation=2),
        run_config(2, 1, "bf16"),
        run_config(2, 2, "fp32", accumulation=2),
        run_config(2, 2, "bf16", micro_batch=16),
        run_config(2, 2, "fp32", micro_batch=1, optimizer="muon", vocab_size=500),
        _stage_3("fp32"),
        _stage_3("bf16", stage3_max_live_parameters=0, stage3_max_reuse_distance=0),
    ]
    assert_estimates(configs, 2, *distributed(2, measure, configs))


@pytest.mark.long
def test_estimate_is_what_tensor_parallel_ranks_take(distributed: Distributed) -> None:
    configs = [
        run_config(1, 2, "fp32", tp=2, accumulation=2),
        run_config(1, 0, "fp32", tp=2),
        run_config(1, 2, "bf16", tp=2, sequence=True, micro_batch=16),
        run_config(1, 0, "fp32", tp=2, sequence=True, recompute="full", micro_batch=16),
    ]
    assert_estimates(configs, 1, *distributed(2, measure, configs))


@pytest.mark.long
def test_estimate_is_what_context_parallel_ranks_take(distributed: Distributed) -> None:
    """Which exchange heads, or gather the keys and values of one."""
    long = {"max_seq_len": 512, "vocab_size": 500}
    configs = [
        run_config(1, 2, "fp32", cp=2, accumulation=2, **long),
        run_config(1, 1, "bf16", cp=2, micro_batch=8, recompute="full", **long),
        run_config(1, 0, "fp32", cp=2, num_kv_heads=1, positions="rotary", **long),
        run_config(1, 2, "fp32", cp=2, num_heads=6, num_kv_heads=3, head_dim=16, **long),
    ]
    assert_estimates(configs, 1, *distributed(2, measure, configs))


def _pieces(sizes: list[int], ranks: int) -> list[list[Piece | None]]:
    """By rank, of matrices that lie one behind the other."""
    part, by_rank = sum(sizes) // ranks, []
    for rank in range(ranks):
        pieces: list[Piece | None] = []
        start = -rank * part  # of a matrix in the partition
        for size in sizes:
            first, end = max(start, 0), min(start + size, part)
            pieces.append(Piece(first - start, first, end - first) if first < end else None)
            start += size
        by_rank.append(pieces)
    return by_rank


def _peaks_of_muon(model: ModelConfig, ranks: range, of: int) -> list[int]:
    """Most bytes of tensors that a rank's second update adds; no other rank is there."""
    peaks = []
    with as_rank(0, of):
        matrices = matrices_of(build_model(model, ProcessGrid()))
        pieces = _pieces([p.numel() for p in matrices.values()], of)
        for rank in ranks:
            grid = ProcessGrid(dp_rank=rank, dp_size=of, replica_group=dist.group.WORLD)
            group = {"params": [*matrices.values()], "names": [*matrices], "muon": True}
            optimizer = Muon([group], grid=grid, momentum=0.95)
            optimizer.follow_partition(pieces)
            with TensorMeter() as meter:
                partition = torch.ones(sum(piece.size for piece in pieces[rank] if piece))
                partition.grad = torch.ones_like(partition)
                optimizer.param_groups[0]["params"] = [partition]
                optimizer.step()
                before = meter.live
                meter.reset_peak()
                optimizer.step()
            peaks.append(meter.peak - before)
    return peaks


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_muon_on_many_ranks_holds_few_matrices_and_the_estimate_says_how_many(mlp: str) -> None:
    """The ranks of a whole block, of 64 that all have a part of a matrix, or of two."""
    config = run_config(
        64, 1, "fp32", micro_batch=1, optimizer="muon", mlp=mlp, num_layers=4, vocab_size=500
    )
    peaks = _peaks_of_muon(config.model, range(16), 64)
    matrices = [*map(Matrix.of, matrices_of(meta_model(config.model)).values())]
    share = share_of_muon(config, 64, "fp32", matrices)
    assert share is not None
    directions = 4 * share.parameters // 64
    assert 1 <= (directions + share.working) / max(peaks) < 1.02
    assert max(peaks) < 4 * share.parameters / 2  # half of them all


_RESIDENT = """
import re
from pathlib import Path
from tests.planning.test_memory import measured_peak, run_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.launch import init_distributed
from megaegpt.planning.memory import estimate_memory
init_distributed()
# Not getrusage's ru_maxrss: a child inherits it from the process that started it.
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
measured_peak(run_config(1, 0, "fp32", num_layers=1), ProcessGrid())  # libraries and thread pools
config = run_config(1, 0, "fp32", micro_batch=16, vocab_size=20000, hidden_size=512, num_layers=6)
estimate = estimate_memory(config, 1, "fp32", device_type="cpu").total
before = peak()
measured_peak(config, ProcessGrid())
print(peak() - before, estimate)
"""


@pytest.mark.long
def test_estimate_is_what_the_process_takes() -> None:
    """The same against the operating system's figure: the growth of peak resident memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", _RESIDENT],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env=environment,
    )
    grown, estimate = map(int, result.stdout.split()[-2:])
    assert 0.85 < estimate / grown < 1.15


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_saves_activations_only(recompute: str) -> None:
    config = run_config(1, 2, "bf16", micro_batch=64)
    keeping = estimate_memory(config, 1, "bf16")
    saving = estimate_memory(
        run_config(1, 2, "bf16", micro_batch=64, recompute=recompute), 1, "bf16"
    )
    assert saving.activations < keeping.activations
    assert (saving.weights, saving.optimizer) == (keeping.weights, keeping.optimizer)


@pytest.mark.parametrize("kind", ["gpt", "egpt"])
def test_shorter_samples_need_less_activations_only(kind: str) -> None:
    config = run_config(1, 2, "bf16", micro_batch=64, kind=kind)
    length = config.model.sample_len
    whole, halves = (
        estimate_memory(config, 1, "bf16", sample_tokens=n) for n in (length, length // 2)
    )
    assert whole == estimate_memory(config, 1, "bf16")
    assert 0.4 * whole.activations < halves.activations < 0.6 * whole.activations
    assert (whole.weights, whole.optimizer) == (halves.weights, halves.optimizer)


def test_weights_are_those_of_the_model() -> None:
    config = run_config(1, 2, "bf16")
    parameters = meta_model(config.model).num_parameters()
    assert estimate_memory(config, 1, "bf16").weights == 2 * parameters
    assert estimate_memory(config, 4, "bf16").optimizer == 12 * parameters // 4


def test_the_frozen_encoder_counts_weights_and_a_pass_without_gradients() -> None:
    config = run_config(1, 2, "bf16", kind="egpt")
    encoder = ModelConfig(vocab_size=4000, hidden_size=128, num_layers=2, num_heads=4)
    without, with_encoder = (estimate_memory(config, 1, "bf16", e) for e in (None, encoder))
    assert with_encoder.frozen == 2 * meta_model(encoder).num_parameters()
    assert without.activations <= with_encoder.activations < 1.5 * without.activations
