"""Plans against the model's own counts and what training really sends."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig, ParallelConfig, TrainingConfig
from megaegpt.config.run import RunConfig
from megaegpt.errors import ConfigError
from megaegpt.model.build import build_inputs, build_model
from megaegpt.parallel.chunks import ChunkShares
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.hardware import find_accelerator
from megaegpt.planning.memory import MemoryEstimate, estimate_memory, trace_rank
from megaegpt.planning.plan import (
    USABLE_MEMORY,
    Machines,
    Plan,
    alternatives,
    alternatives_over_context,
    count_communication,
    impossible_sizes,
    make_plan,
    recommend,
)
from tests.distributed.harness import Distributed, grid_for
from tests.tiny.engines import make_engine, micro_batches, run_config


class Traffic(TorchDispatchMode):
    """Bytes of floating-point tensors that go through collectives, by their operator."""

    def __init__(self) -> None:
        super().__init__()
        self.summed: list[int] = []
        self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d") and _ranks(args) > 1:  # DeepSpeed speaks to itself as well
            tensors = [x for x in tree_leaves(args[0]) if x.is_floating_point()]
            if "allreduce" in name:
                self.summed += [_size(x) for x in tensors]
            elif "alltoall" in name or "all_to_all" in name:
                self.gathered += max(_size(args[0]), _size(args[1]))
            elif "reduce_scatter" in name:
                self.gathered += _size(args[1])
            elif "gather" in name:
                self.gathered += sum(_size(x) for x in tensors)
        return func(*args, **(kwargs or {}))


def _ranks(args: Any) -> int:
    """Size of the process group among an operator's arguments."""
    boxed = next(x for x in args if isinstance(x, torch.ScriptObject))
    return dist.ProcessGroup.unbox(boxed).size()


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


_SCALARS = 16
"""Bytes: what is smaller are norms, losses and flags, which plans leave out."""


def measure(configs: list[RunConfig]) -> list[tuple[int, int]]:
    """On a worker: bytes summed, and gathered or scattered, in a training step of each."""
    found = []
    for config in configs:
        parallel = config.parallel
        grid = grid_for(parallel.tensor_parallel_size, parallel.context_parallel_size)
        engine = make_engine(config, grid)
        for step in range(2):
            with Traffic() as traffic:
                engine.train_step(step, micro_batches(step, config, engine.grid))
        engine.close()
        found.append((sum(x for x in traffic.summed if x > _SCALARS), traffic.gathered))
    return found


def predict(config: RunConfig, ranks: int) -> tuple[int, int]:
    """The same from the plan."""
    dp, precision = ranks // config.parallel.ranks_of_a_sample, config.training.precision
    step = trace_rank(config, dp, precision, device_type="cpu")  # type: ignore[arg-type]
    sent = count_communication(config, dp, precision, step)  # type: ignore[arg-type]
    in_parts = sent.weights + sent.scattered + sent.sequence_parallel + sent.context_parallel
    in_parts += sent.gathered_matrices + sent.cut_matrices
    return sent.tensor_parallel + sent.gradients, in_parts


def _run(
    tp: int,
    precision: str = "fp32",
    stage: int = 2,
    recompute: str = "none",
    sequence: bool = False,
    cp: int = 1,
    **model: Any,
) -> RunConfig:
    return run_config(
        model=model,
        parallel={
            "tensor_parallel_size": tp,
            "zero_stage": stage,
            "sequence_parallel": sequence,
            "context_parallel_size": cp,
        },
        training={"precision": precision, "activation_checkpointing": recompute},
    )


@pytest.mark.long
def test_data_parallel_traffic_is_what_training_sends(distributed: Distributed) -> None:
    configs = [_run(1, precision, stage) for precision in ("fp32", "bf16") for stage in (0, 1, 2)]
    small_too = {"stage3_param_persistence_threshold": 0}  # gathers them in every micro-step
    configs.append(
        dataclasses.replace(_run(1, "bf16", 3), deepspeed={"zero_optimization": small_too})
    )
    predicted = [predict(config, 2) for config in configs]
    assert distributed(2, measure, configs) == [predicted] * 2


def _muon(tp: int, stage: int, precision: str = "fp32") -> RunConfig:
    config = _run(tp, precision, stage, num_layers=1)
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind="muon"))


def test_muons_traffic_is_what_training_sends(distributed: Distributed) -> None:
    """Of the rank that sends most, where partitions cut matrices."""
    configs = [_muon(1, 1, "bf16"), _muon(1, 2), _muon(2, 1)]
    predicted = [predict(config, 2) for config in configs]
    by_rank = distributed(2, measure, configs)
    for expected, *found in zip(predicted, *by_rank, strict=True):
        assert tuple(map(max, zip(*found, strict=True))) == expected


@pytest.mark.long
def test_tensor_parallel_traffic_is_what_training_sends(distributed: Distributed) -> None:
    configs = [
        _run(2),
        _run(2, recompute="full"),
        _run(2, recompute="selective", dropout=0.1),
        _run(2, num_kv_heads=1, positions="rotary", window=4),
        _run(2, attention="latent", latent_dim=16, positions="rotary", rope_head_dim=4),
        _run(2, kind="egpt", tied_embeddings=False),
        _run(2, kind="deepgpt", tied_embeddings=False),
    ]
    predicted = [predict(config, 2)[0] for config in configs]
    for measured in distributed(2, measure, configs):
        assert [summed for summed, _ in measured] == predicted


@pytest.mark.long
def test_sequence_parallel_traffic_is_what_training_sends(distributed: Distributed) -> None:
    configs = [
        _run(2, sequence=True),
        _run(2, sequence=True, recompute="full", dropout=0.1),
        _run(2, sequence=True, attention="latent", latent_dim=16, positions="rotary"),
        _run(2, sequence=True, kind="egpt", tied_embeddings=False),
    ]
    predicted = [predict(config, 2) for config in configs]
    assert distributed(2, measure, configs) == [predicted] * 2


_GATHERED = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 8}
"""Heads that two ranks cannot share out."""
_LATENT = {"attention": "latent", "latent_dim": 16, "positions": "rotary", "rope_head_dim": 4}


def test_context_parallel_traffic_is_what_training_sends(distributed: Distributed) -> None:
    """By heads for all tokens; and gradients as of data parallelism."""
    config = _run(1, cp=2)
    assert distributed(2, measure, [config]) == [[predict(config, 2)]] * 2


@pytest.mark.long
def test_gathered_keys_and_latents_are_what_training_sends(distributed: Distributed) -> None:
    configs = [
        _run(1, cp=2, **_GATHERED, positions="rotary", window=4),
        _run(1, cp=2, recompute="full", num_heads=3, head_dim=8, **_LATENT),
    ]
    predicted = [predict(config, 2) for config in configs]
    assert distributed(2, measure, configs) == [predicted] * 2


@pytest.mark.long
def test_context_and_sequence_parallel_traffic_are_what_training_sends(
    distributed: Distributed,
) -> None:
    configs = [
        _run(2, cp=2, sequence=True),
        _run(2, cp=2, recompute="selective", num_kv_heads=2),
        _run(2, "bf16", cp=2, **_LATENT),
    ]
    predicted = [predict(config, 4) for config in configs]
    assert distributed(4, measure, configs) == [predicted] * 4


def test_exchanged_heads_and_gathered_keys_are_as_many_bytes_as_the_formulas_say() -> None:
    """B rows of T tokens in fp32, and four kinds of numbers of C = 32 a token: queries, keys,
    values and outputs, exchanged forward and their gradients backward by the rank that has half of
    the tokens; of keys and values of a single head of 8, both ranks have it. Keys and values of 3
    heads, gathered, are those of all tokens, twice.
    """
    rows, tokens, layers = 2, 16, 2
    exchanged = trace_rank(_run(1, cp=2), 1, "fp32", device_type="cpu").shared
    assert exchanged == layers * 2 * 4 * rows * tokens // 2 * 32 * 4
    single = trace_rank(_run(1, cp=2, num_kv_heads=1), 1, "fp32", device_type="cpu").shared
    assert single == layers * 2 * rows * tokens // 2 * 2 * (32 + 2 * 8) * 4
    gathered = trace_rank(_run(1, cp=2, **_GATHERED), 1, "fp32", device_type="cpu").shared
    assert gathered == layers * 2 * 2 * rows * tokens * 3 * 8 * 4


_SHARED = dataclasses.replace(
    _run(
        1,
        kind="egpt",
        tied_embeddings=False,
        egpt=EGPTConfig(num_chunks=4, chunk_size=8, token_memory=True, memory_dim=6),
    ),
    parallel=ParallelConfig(context_parallel_size=2),
)
"""Windows that two ranks share."""


def _shared_by_two() -> int:
    """On a worker: bytes that a micro-step gathers and scatters."""
    grid, model = grid_for(1, 2), _SHARED.model
    states = torch.zeros(_SHARED.training.micro_batch_size, 4, 8, model.hidden_size)
    tokens = torch.zeros(len(states), 32, dtype=torch.long)
    inputs = build_inputs(model, lambda own: states[:, : own.shape[1]], shares=ChunkShares(grid))
    batch = inputs.prepare({"tokens": tokens, "targets": tokens})
    with Traffic() as traffic:
        inputs.loss(build_model(model, grid), batch).backward()
    return traffic.gathered


def test_chunk_parallel_traffic_is_what_training_sends_and_what_the_formula_says(
    distributed: Distributed,
) -> None:
    """C numbers a chunk once, and as many as keys have a token once, and once more backward."""
    step = trace_rank(_SHARED, 1, "fp32", device_type="cpu")
    rows, features, keys = _SHARED.training.micro_batch_size, 4 * 32, 4 * 8 * 6
    assert step.shared == rows * (features + 2 * keys) * 4
    assert distributed(2, _shared_by_two) == [step.shared] * 2
    sent = count_communication(_SHARED, 1, "fp32", step)
    assert sent.context_parallel == _SHARED.gradient_accumulation(1) * step.shared


@pytest.mark.long
def test_both_together_are_what_training_sends(distributed: Distributed) -> None:
    config = _run(2, "bf16")
    assert distributed(4, measure, [config]) == [[predict(config, 4)]] * 4


# -- counts and choices


def _gpt2(**training: Any) -> RunConfig:
    return RunConfig(model=ModelConfig(num_layers=2), training=TrainingConfig(**training))


_GPT2 = _gpt2()


def _plan(config: RunConfig = _GPT2, gpu: str = "h100", gpus: int = 8, **given: Any) -> Plan:
    return make_plan(config, Machines(find_accelerator(gpu, 8), gpus, min(8, gpus)), **given)


def test_parameters_and_operations_are_the_models() -> None:
    model = build_model(_GPT2.model, ProcessGrid())
    plan = _plan()
    assert plan.size.parameters == sum(p.numel() for p in model.parameters())
    assert plan.size.flops_per_token == model.flops_per_token()
    assert plan.memory == estimate_memory(_GPT2, 8, "bf16")


def test_time_follows_from_the_peak_and_the_traffic() -> None:
    plan = _plan(efficiency=0.25)
    assert plan.time is not None
    assert plan.time.context_parallel == 0
    assert plan.tokens_per_second is not None
    work = plan.size.flops_per_token * 8 * 1024 / 8  # 8 samples on 8 GPUs
    assert plan.time.compute == pytest.approx(work / (989e12 / 4))
    weights = 2 * plan.size.parameters
    assert plan.time.gradients == pytest.approx(2 * 7 / 8 * weights / 450e9)
    assert plan.time.weights == pytest.approx(7 / 8 * weights / 450e9)
    assert plan.tokens_per_second == pytest.approx(8 * 1024 / plan.time.total)
    across = _plan(_gpt2(global_batch_size=16), gpus=16).time
    assert across is not None
    assert across.gradients == pytest.approx(2 * 15 / 16 * weights / 400e9)  # 8 ways of 50 GB/s
    assert _plan(gpu="cpu").time is None
    assert _plan(gpu="cpu", flops=1e12).time is not None


@pytest.mark.parametrize(
    ("ranks", "stride", "speed"),
    [
        (8, 1, 450e9),  # in one machine
        (2, 4, 450e9),
        (16, 1, 400e9),  # over the network, by the ways of all 8 GPUs of a machine
        (8, 2, 200e9),  # by those of every other
        (2, 8, 50e9),
        (4, 16, 50e9),
    ],
)
def test_a_group_uses_the_links_of_all_its_ranks_in_a_machine(
    ranks: int, stride: int, speed: float
) -> None:
    machines = Machines(find_accelerator("h100", 8), 64, 8)
    assert machines.bandwidth(ranks, stride) == speed


def test_stage_3_takes_weights_off_a_rank_and_gathers_them_for_every_pass() -> None:
    def at(stage: int, offload: str = "none") -> Plan:
        parallel = ParallelConfig(zero_stage=stage, offload=offload)  # type: ignore[arg-type]
        live = {"stage3_max_live_parameters": 0} if stage == 3 else {}
        raw = {"zero_optimization": live}
        return _plan(dataclasses.replace(_GPT2, parallel=parallel, deepspeed=raw))

    second, third, offloaded = at(2), at(3), at(3, "parameters")
    size = 2 * third.size.parameters
    assert third.memory.weights == pytest.approx(size / 8, rel=1e-3)
    assert third.memory.optimizer == pytest.approx(second.memory.optimizer, rel=1e-3)
    assert third.communication.weights == 2 * second.communication.weights == 2 * size
    assert third.communication.scattered == second.communication.gradients == size
    assert third.time is not None
    assert third.time.gradients == pytest.approx(7 / 8 * size / 450e9)
    assert offloaded.memory.weights == offloaded.memory.optimizer == 0
    assert offloaded.time is None


def test_sequence_parallelism_takes_memory_off_a_rank_and_sends_parts_in_the_place_of_sums() -> (
    None
):
    model = ModelConfig(vocab_size=1000, num_layers=2)
    config = RunConfig(model=model, parallel=ParallelConfig(tensor_parallel_size=4))
    parallel = dataclasses.replace(config.parallel, sequence_parallel=True)
    without, plan = _plan(config), _plan(dataclasses.replace(config, parallel=parallel))
    assert plan.memory.activations < 0.65 * without.memory.activations
    assert without.communication.sequence_parallel == 0
    sent = plan.communication
    # Sums are left of the gradients of norms and biases, and of the head's input.
    assert sent.tensor_parallel < without.communication.tensor_parallel / 4
    assert plan.time is not None
    parts = 2 * sent.tensor_parallel + sent.sequence_parallel
    assert plan.time.tensor_parallel == pytest.approx(3 / 4 * parts / 450e9)


def test_a_ring_of_ranks_with_strides_has_as_many_ways_as_a_machine_has_of_them() -> None:
    config = _gpt2(global_batch_size=8)
    parallel = ParallelConfig(tensor_parallel_size=8, context_parallel_size=2)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_heads=16, hidden_size=1024),
        parallel=parallel,
    )
    plan = _plan(config, gpus=16)
    sent = plan.communication.context_parallel
    assert plan.time is not None
    assert plan.time.context_parallel == pytest.approx(sent / 2 / 50e9)  # one way of eight


def test_what_is_offloaded_is_so_at_stage_3_alone() -> None:
    config = dataclasses.replace(
        _gpt2(global_batch_size=8),
        parallel=ParallelConfig(zero_stage=3, offload="optimizer"),
        deepspeed={"zero_optimization": {"stage3_max_live_parameters": 10, "reduce_scatter": True}},
    )
    plan = _plan(config)
    found = recommend(plan, functools.partial(make_plan, machines=plan.machines))
    assert found is not None
    assert found.fits
    assert found.config.parallel.zero_stage == 1
    assert found.config.parallel.offload == "none"
    assert found.config.deepspeed == {"zero_optimization": {"reduce_scatter": True}}


@pytest.mark.long
def test_what_does_not_fit_has_alternatives_that_do() -> None:
    sizes = {"vocab_size": 1000, "max_seq_len": 128, "hidden_size": 128, "num_layers": 1}
    model = ModelConfig(**sizes, num_heads=4)  # type: ignore[arg-type]
    config = RunConfig(
        model=model, training=_gpt2(global_batch_size=64, micro_batch_size=32).training
    )
    gpu = find_accelerator("a100", 2)
    needed = make_plan(config, Machines(gpu, 2, 2)).memory.total
    small = dataclasses.replace(gpu, memory=int(0.6 * needed))
    replan = functools.partial(make_plan, machines=Machines(small, 2, 2))
    plan = replan(config)
    assert not plan.fits
    every = alternatives(plan, replan)
    found = [other for other in every if other.fits]
    assert found
    assert every[: len(found)] == found  # what does not fit comes last
    assert [other.config.training.micro_batch_size for other in every[len(found) :]] in ([], [1])
    for other in found:
        assert other.memory.total <= USABLE_MEMORY * small.memory
        assert other.config.training.global_batch_size == 64
        parallel = other.config.parallel
        assert parallel.sequence_parallel == (parallel.tensor_parallel_size > 1)
    times = [other.time.total for other in found if other.time]
    assert times == sorted(times)
    tried = {other.config.training.activation_checkpointing for other in found}
    assert len(tried) > 1


def test_alternatives_are_ranked_by_the_time_that_is_given_and_name_what_does_not_fit() -> None:
    model = ModelConfig(vocab_size=500, max_seq_len=32, hidden_size=64, num_layers=1, num_heads=2)
    config = RunConfig(model=model, training=_gpt2(global_batch_size=8).training)
    plan = _plan(config, gpus=4)

    def replan(config: RunConfig) -> Plan:
        """A sample takes 80 GiB without recomputation, and 20 with it."""
        training = config.training
        size = {"none": 80, "selective": 20, "full": 20}[training.activation_checkpointing]
        memory = MemoryEstimate(activations=training.micro_batch_size * size * 2**30)
        return dataclasses.replace(plan, config=config, memory=memory)

    def seconds(other: Plan) -> float:
        """The more is recomputed, the less: nothing else ranks them so."""
        return -len(other.config.training.activation_checkpointing)

    every = alternatives(plan, replan, seconds)
    shown = [
        (
            other.fits,
            other.config.parallel.tensor_parallel_size,
            other.config.training.activation_checkpointing,
            other.config.training.micro_batch_size,
        )
        for other in every
    ]
    assert shown == [
        (True, 1, "selective", 2),
        (True, 2, "selective", 2),
        (True, 2, "full", 2),
        (False, 1, "none", 1),
        (False, 2, "none", 1),
    ]
    assert list(impossible_sizes(plan)) == [4]
    assert "num_heads" in impossible_sizes(plan)[4]


def test_only_what_does_not_fit_on_gpus_is_offloaded_and_comes_behind_what_has_a_time() -> None:
    model = ModelConfig(vocab_size=500, max_seq_len=32, hidden_size=64, num_layers=1, num_heads=2)
    parallel = ParallelConfig(zero_stage=3, offload="optimizer")
    training = _gpt2(global_batch_size=8).training
    plan = _plan(RunConfig(model=model, training=training, parallel=parallel), gpus=4)
    on_gpus = _plan(RunConfig(model=model, training=training), gpus=4)
    assert plan.time is None
    assert on_gpus.time is not None

    def replan(config: RunConfig) -> Plan:
        """Weights take 80 GiB on a GPU, half as much on two, and little where they are offloaded;
        a sample takes 30.
        """
        parallel = config.parallel
        offloads = parallel.offload != "none"
        weights = 1 if offloads else 80 // parallel.tensor_parallel_size
        size = weights + 30 * config.training.micro_batch_size
        memory = MemoryEstimate(activations=size * 2**30)
        time = None if offloads else on_gpus.time
        return dataclasses.replace(plan, config=config, memory=memory, time=time)

    found = alternatives(replan(plan.config), replan)
    kinds = [
        (other.fits, other.config.parallel.tensor_parallel_size, other.config.parallel.offload)
        for other in found
    ]
    assert list(dict.fromkeys(kinds)) == [(True, 2, "none"), (True, 1, "optimizer")]


def test_a_sample_too_long_for_one_rank_is_shared_by_as_few_as_it_fits() -> None:
    config = _gpt2(global_batch_size=8)
    plan, limit = _plan(config, gpus=8), USABLE_MEMORY * find_accelerator("h100", 8).memory

    def replan(config: RunConfig) -> Plan:
        """Of samples that take three times a GPU."""
        share = config.training.micro_batch_size / config.parallel.ranks_of_a_sample
        memory = dataclasses.replace(plan.memory, activations=int(3 * limit * share))
        return dataclasses.replace(plan, config=config, memory=memory)

    on_one_rank = dataclasses.replace(
        replan(config), machines=Machines(plan.machines.accelerator, 8, 1)
    )
    assert not any(other.fits for other in alternatives(on_one_rank, replan))
    found = alternatives_over_context(on_one_rank, replan)
    assert {other.config.parallel.context_parallel_size for other in found} == {4}
    assert all(other.fits for other in found)


def test_what_fits_on_no_ranks_keeps_what_was_tried_on_fewer() -> None:
    """15 chunks cannot be shared by two ranks, so that they have no rows."""
    chunks = EGPTConfig(num_chunks=15, chunk_size=16)
    sizes = {"hidden_size": 64, "num_layers": 1, "num_heads": 2}
    model = ModelConfig(kind="egpt", egpt=chunks, encoder=EncoderConfig(source="gpt2"), **sizes)  # type: ignore[arg-type]
    plan = _plan(RunConfig(model=model, training=_gpt2(global_batch_size=2).training), gpus=2)

    def replan(config: RunConfig) -> Plan:
        memory = dataclasses.replace(plan.memory, activations=1 << 60)
        return dataclasses.replace(plan, config=config, memory=memory)

    found = alternatives_over_context(replan(plan.config), replan)
    assert found
    assert {other.config.parallel.context_parallel_size for other in found} == {1}


def test_stage_2_is_recommended_where_only_it_fits() -> None:
    """Stage 1 keeps the gradients of all parameters in fp32."""
    model = ModelConfig(
        vocab_size=50257, max_seq_len=16, hidden_size=128, num_layers=1, num_heads=4
    )
    training = TrainingConfig(global_batch_size=4, micro_batch_size=1)
    config = RunConfig(model=model, training=training)
    gpu = find_accelerator("h100", 4)

    def needed(stage: int) -> int:
        parallel = dataclasses.replace(config.parallel, zero_stage=stage)
        run = dataclasses.replace(config, parallel=parallel)
        return make_plan(run, Machines(gpu, 4, 4)).memory.total

    between = int((needed(1) + needed(2)) / 2 / USABLE_MEMORY)
    for memory, stage in ((gpu.memory, 1), (between, 2)):
        machines = Machines(dataclasses.replace(gpu, memory=memory), 4, 4)
        replan = functools.partial(make_plan, machines=machines)
        best = recommend(replan(config), replan)
        assert best is not None
        assert best.config.parallel.zero_stage == stage
        assert best.config.training.global_batch_size == 4


def test_a_plan_for_a_number_of_gpus_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.global_batch_size"):
        _plan(gpus=3)
