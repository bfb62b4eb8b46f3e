"""Simulated steps: what they add up, hide and extrapolate."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from megaegpt.config import (
    DataConfig,
    EGPTConfig,
    EncoderConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megaegpt.config.loading import load_config
from megaegpt.errors import ConfigError
from megaegpt.planning.hardware import find_accelerator
from megaegpt.planning.memory_trace import trace_micro_step
from megaegpt.planning.plan import Machines, Plan, make_plan
from megaegpt.planning.roofline import (
    BYTES_OF_ADAMW,
    BYTES_OF_MUON,
    OperatorCosts,
    Rates,
    iteration_cost,
)
from megaegpt.planning.simulation import (
    NETWORK_HOP,
    NVLINK_HOP,
    REACHED_LINKS,
    Program,
    TracedBlocks,
    assumptions,
    can_simulate,
    describe_simulation,
    reachable_rates,
    ring_hops,
    simulate,
    sum_hops,
    trace_blocks,
)
from megaegpt.shipped import SHIPPED

_SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "max_seq_len": 64,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
}


_RATES = reachable_rates(Machines(find_accelerator("h100", 8), 8, 8), "bf16")


def _config(tp: int = 1, stage: int = 2, overlap: bool = False, **model: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(**_SIZES | model),
        parallel=ParallelConfig(
            tensor_parallel_size=tp,
            zero_stage=stage,
            overlap_comm=overlap,
            sequence_parallel=tp > 1,
        ),
        training=TrainingConfig(
            precision="bf16", global_batch_size=128, activation_checkpointing="selective"
        ),
    )


@functools.cache
def _plan(tp: int = 1) -> Plan:
    """On 32 H100s; made once, as it is played through."""
    return make_plan(_config(tp), Machines(find_accelerator("h100", 8), 32, 8))


@functools.cache
def _traced(tp: int = 1) -> TracedBlocks:
    return trace_blocks(_config(tp), "bf16", reachable_rates(_plan(tp).machines, "bf16"))


def _expect_all_blocks(traced: TracedBlocks, config: RunConfig) -> None:
    """What follows from few blocks is what is counted with all of them."""
    tp = config.parallel.tensor_parallel_size
    compute = traced.compute(compiled=False)
    counter = OperatorCosts(config.model.padded_vocab_size // tp, _RATES)
    step = trace_micro_step(config, "bf16", None, "cuda", False, observed_by=counter)
    seconds = {kind: cost.seconds for kind, cost in counter.costs.items()}
    products = seconds["products"] + seconds.get("own products", 0.0)
    assert compute.products == pytest.approx(products)
    for kind in ("attention", "head", "rest"):
        assert getattr(compute, kind) == pytest.approx(seconds.get(kind, 0.0))
    assert (traced.summed, traced.cut) == (step.summed, step.cut)


def test_blocks_are_alike_so_that_two_of_them_say_what_all_take() -> None:
    _expect_all_blocks(_traced(2), _config(2))


def _frozen(config: RunConfig, *parts: str) -> RunConfig:
    training = dataclasses.replace(config.training, freeze=parts)
    return dataclasses.replace(config, training=training)


@pytest.mark.parametrize(
    ("model", "freeze"),
    [
        ({"window": 16, "window_every": 2}, []),
        pytest.param(
            {"window": 16, "window_every": 4, "num_layers": 6}, [], marks=pytest.mark.long
        ),
        ({}, ["layers:1-2"]),
        pytest.param({"num_layers": 4}, ["layers:0-2", "embeddings"], marks=pytest.mark.long),
        pytest.param({}, ["layers:0-2"], marks=pytest.mark.long),
        pytest.param(
            {"window": 16, "window_every": 2, "num_layers": 4},
            ["layers:1-2"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_blocks_that_are_not_alike_are_all_counted(
    model: dict[str, Any], freeze: list[str]
) -> None:
    config = _frozen(_config(**model), *freeze)
    _expect_all_blocks(trace_blocks(config, "bf16", _RATES), config)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "freeze", "twice"),
    [
        ({"window": 16, "window_every": 2}, [], []),
        ({}, ["layers:0-2", "embeddings"], ["layers:0-5", "embeddings"]),
        ({}, ["layers:1-2"], ["layers:2-5"]),
        ({}, ["layers:0-3"], ["layers:0-7"]),
    ],
)
def test_what_blocks_take_by_themselves_is_what_twice_as_many_take_more(
    model: dict[str, Any], freeze: list[str], twice: list[str]
) -> None:
    """Of their products by as much more are computed as are repeated."""

    def products(layers: int, frozen: list[str], repeated: float = 0.0) -> float:
        config = _frozen(_config(**model, num_layers=layers), *frozen)
        traced = trace_blocks(config, "bf16", _RATES, own_operators=False)
        return traced.compute(False, repeats_products=repeated).products

    once = products(4, freeze)
    of_blocks = products(4, freeze, repeated=3.0) - once  # a third of them is forward
    assert of_blocks == pytest.approx(products(8, twice) - once)


@pytest.mark.parametrize("predictions", ["stored", pytest.param("online", marks=pytest.mark.long)])
def test_an_egpt_of_which_the_memory_alone_learns_is_simulated(predictions: Any) -> None:
    """The form of configs/egpt_smollm2.yaml: every block is frozen, and may be computed once."""
    egpt = EGPTConfig(num_chunks=4, chunk_size=16, token_memory=True, memory_gate=True)
    config = _config(kind="egpt", max_seq_len=16, egpt=egpt, encoder=EncoderConfig(source="none"))
    parts = ("layers:0-2", "norm", "head", "input_mlp", "embeddings")
    data = DataConfig(token_features="stored", predictions=predictions)
    config = dataclasses.replace(_frozen(config, *parts), data=data)
    machines = Machines(find_accelerator("h100", 1), 1, 1)
    simulated = simulate(make_plan(config, machines))
    assert simulated.seconds > 0
    assert simulated.mfu is None  # by operations of what is not trained
    assert "n/a MFU" in describe_simulation(simulated)[-1]
    assert (simulated.compute.attention == 0) == (predictions == "stored")
    _expect_all_blocks(trace_blocks(config, "bf16", _RATES), config)


@pytest.mark.long
@pytest.mark.parametrize("path", sorted((SHIPPED / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_run_is_planned_and_simulated(path: Path) -> None:
    """In bf16: of fp32 the table does not have the speed."""
    config = load_config(path, ["training.precision=bf16"])
    gpus = config.parallel.ranks_of_a_sample
    plan = make_plan(config, Machines(find_accelerator("h100", gpus), gpus, gpus))
    assert simulate(plan).seconds > 0


def test_a_step_is_its_computation_its_update_and_what_is_exposed() -> None:
    plan = _plan()
    step = simulate(plan)
    assert plan.time is not None
    assert step.micro_steps == 4
    exposed = step.sent["gradients"].seconds + step.sent["weights"].seconds
    assert step.exposed == pytest.approx(exposed)
    whole = 4 * step.compute.total + step.update + exposed
    assert step.seconds == pytest.approx(whole)
    assert step.tokens_per_gpu == pytest.approx(128 * 64 / whole / 32)
    assert step.mfu == pytest.approx(step.tokens_per_gpu * plan.size.flops_per_token / 989e12)
    hops = 28 * NVLINK_HOP + 3 * NETWORK_HOP
    gathered = plan.time.weights / REACHED_LINKS + hops
    assert step.sent["weights"].seconds == pytest.approx(gathered)


def test_what_is_hidden_is_what_the_program_sends_beside_its_computation() -> None:
    plan, traced = _plan(tp=2), _traced(tp=2)
    exposed = simulate(plan, program=Program(False, False, 10), traced=traced).sent
    hiding = Program(True, True, 10, hides_tensor_parallel=0.75)
    hidden = simulate(plan, program=hiding, traced=traced).sent
    for kind, share in (("gradients", 0.1), ("weights", 0.1), ("tensor_parallel", 0.25)):
        assert exposed[kind].exposed == exposed[kind].seconds > 0
        assert hidden[kind].seconds == exposed[kind].seconds
        least = share * hidden[kind].seconds
        assert least * (1 - 1e-9) <= hidden[kind].exposed < exposed[kind].exposed


@pytest.mark.long
def test_no_more_is_hidden_than_there_is_computation_beside_it() -> None:
    plan = _plan()
    assert plan.time is not None
    slow = dataclasses.replace(plan, time=dataclasses.replace(plan.time, gradients=1.0))
    step = simulate(slow, program=Program(True, False, 10), traced=_traced())
    backward = 4 * step.compute.total * 2 / 3
    assert step.sent["gradients"].exposed == pytest.approx(
        step.sent["gradients"].seconds - backward
    )


def test_muons_iterations_gathers_and_exchanges_are_a_part_of_the_step() -> None:
    """A rank of 16 replicas has a part of one or two of 18 matrices, half of each by its group."""
    config = _config(tp=2, stage=1)
    optimizer = dataclasses.replace(config.optimizer, kind="muon")
    plan = make_plan(dataclasses.replace(config, optimizer=optimizer), _plan(2).machines)
    adamw, muon = simulate(_plan(2), traced=_traced(2)), simulate(plan, traced=_traced(2))
    assert plan.muon is not None
    rates = reachable_rates(plan.machines, "bf16")
    iterations = sum(iteration_cost(m, rates).seconds for m in plan.muon.matrices)
    more_bytes = plan.muon.parameters * (BYTES_OF_MUON - BYTES_OF_ADAMW) / 16
    more_bytes += sum(26 * m.whole for m in plan.muon.matrices)
    assert muon.update == pytest.approx(adamw.update + iterations + more_bytes / rates.bytes)
    gathered, exchanged = plan.communication.gathered_matrices, plan.communication.cut_matrices
    links = gathered / 2 / 450e9 + exchanged / 50e9
    hops = len(plan.muon.matrices) * NVLINK_HOP + NETWORK_HOP
    assert muon.sent["matrices"].exposed == pytest.approx(links / REACHED_LINKS + hops)
    assert adamw.sent["matrices"].seconds == 0
    text = "\n".join(" ".join(row) for row in assumptions(muon))
    assert "52 bytes a parameter of a rank's share, in fp32, and iterations in bf16 on 2" in text


def test_this_program_hides_gradients_at_stage_2_where_it_is_told_to() -> None:
    def hides(stage: int, overlap: bool) -> bool:
        config = _config(stage=stage, overlap=overlap)
        return Program.of(dataclasses.replace(_plan(), config=config)).hides_gradients

    assert [hides(2, True), hides(2, False), hides(1, True)] == [True, False, False]


def test_a_ring_waits_for_each_of_its_links() -> None:
    machines = Machines(find_accelerator("h100", 8), 64, 8)
    assert ring_hops(machines, 8) == pytest.approx(7 * NVLINK_HOP)
    assert ring_hops(machines, 64) == pytest.approx(56 * NVLINK_HOP + 7 * NETWORK_HOP)
    assert ring_hops(machines, 8, stride=8) == pytest.approx(7 * NETWORK_HOP)


def test_a_sum_over_many_machines_goes_by_a_tree() -> None:
    machines = Machines(find_accelerator("h100", 8), 4096, 8)
    assert sum_hops(machines, 8) == pytest.approx(2 * 7 * NVLINK_HOP)
    assert sum_hops(machines, 4096) == pytest.approx(2 * (7 * NVLINK_HOP + 9 * NETWORK_HOP))
    assert sum_hops(machines, 2, stride=8) == pytest.approx(2 * NETWORK_HOP)


def test_short_sums_and_narrow_heads_are_slower() -> None:
    rates = reachable_rates(Machines(find_accelerator("h100", 8), 8, 8), "bf16")
    assert rates.product(320) == pytest.approx(rates.flops / 2)
    assert rates.product(1e9) == pytest.approx(0.6 * 989e12)
    assert rates.attention(128) == rates.attention(256) == pytest.approx(0.35 * 989e12)
    assert rates.attention(64) == rates.attention(128) / 2


def test_repeated_products_and_compiled_blocks_change_the_computation() -> None:
    config = _config(norm="rms_norm", mlp="swiglu", positions="rotary")
    traced = trace_blocks(config, "bf16", Rates(1e12, 1e12, 1e11), own_operators=False)
    plain, repeated = traced.compute(False), traced.compute(False, repeats_products=1.0)
    assert plain.products < repeated.products < 4 / 3 * plain.products
    compiled = traced.compute(True)
    assert compiled.rest < plain.rest
    assert compiled.products == plain.products


def test_what_has_no_peak_is_not_simulated() -> None:
    machines = Machines(find_accelerator("cpu", 8), 8, 8)
    assert not can_simulate(machines, "fp32")
    with pytest.raises(ConfigError, match="cannot be simulated"):
        reachable_rates(machines, "fp32")


def test_every_constant_of_the_simulation_is_listed() -> None:
    machines = Machines(find_accelerator("a100", 8), 32, 8)
    plan = dataclasses.replace(_plan(), machines=machines)
    rows = assumptions(simulate(plan, traced=_traced()))
    text = "\n".join(" ".join(row) for row in rows)
    for words in (
        "312 TFLOP/s in bf16",
        "74% of the peak, half of that at sums of 320 terms",
        "60% of the peak at 128 columns",
        "85% of 2,039 GB/s",
        "80% of 300 GB/s, 3.4 us",
        "80% of 25.0 GB/s a GPU",
        "100% exposed",
        "36 bytes",
    ):
        assert words in text
