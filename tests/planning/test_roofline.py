"""The least time of a step: what it counts, and what it says of the sizes of GPT-2."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode

from megaegpt.config import EGPTConfig, EncoderConfig, ModelConfig, TrainingConfig
from megaegpt.config.run import RunConfig
from megaegpt.errors import ConfigError
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.planning.hardware import find_accelerator
from megaegpt.planning.muon_share import Matrix, operations
from megaegpt.planning.plan import Machines, make_plan
from megaegpt.planning.roofline import (
    COMPILED_GPT2,
    COMPILED_LLAMA,
    SHORTEST,
    Cost,
    OperatorCosts,
    Rates,
    Roofline,
    gpt2_runs,
    iteration_cost,
    make_roofline,
)
from megaegpt.training.engine.muon import orthogonalized

_RATES = Rates.of(1e15, 3e12)


def _roofline(config: RunConfig, gpus: int = 1) -> Roofline:
    return make_roofline(make_plan(config, Machines(find_accelerator("h100", 8), gpus, 8)))


def _gpt(rows: int = 2, **model: Any) -> RunConfig:
    """Of 32 tokens a row."""
    sizes = {"vocab_size": 1000, "max_seq_len": 32, "hidden_size": 64, "num_layers": 2}
    return RunConfig(
        model=ModelConfig(
            **{**sizes, "num_heads": 4, "encoder": EncoderConfig(source="not read"), **model}
        ),
        training=TrainingConfig(micro_batch_size=rows, global_batch_size=8),
    )


def test_an_operator_costs_its_operations_or_its_bytes() -> None:
    counter = OperatorCosts(1000, _RATES)
    a, b = (torch.zeros(512, 512) for _ in range(2))
    logits = torch.zeros(4096, 1000, dtype=torch.bfloat16)
    columns = torch.zeros(4096, 1, dtype=torch.int64)
    with counter:
        (a @ b).view(-1)
        a + b
        logits.mul_(2)
        logits.gather(1, columns)
    products, head = counter.costs["products"], counter.costs["head"]
    assert (products.kernels, products.flops, products.bytes) == (1, 2 * 512**3, 3 * a.nbytes)
    assert counter.costs["rest"].bytes == 3 * a.nbytes
    assert head.kernels == 2
    assert head.bytes == 2 * logits.nbytes + 4096 * (8 + 2 + 2)
    moved = 2 * logits.nbytes / _RATES.bytes
    assert head.seconds == pytest.approx(moved + SHORTEST)


def test_products_and_attention_have_the_operations_of_the_model() -> None:
    """By the model's own count causal attention counts in full, and forward only once."""
    config = _gpt()
    roofline = _roofline(config)
    attention = 3 * 2 * 32 * 2 * 64 * 2 * 64  # passes, products, keys, layers, width, tokens
    counted = roofline.plan.size.flops_per_token * roofline.tokens
    padded = config.model.padded_vocab_size - config.model.vocab_size
    products = counted - attention + 3 * 2 * padded * 64 * roofline.tokens
    assert roofline.products.flops == products
    assert roofline.attention.flops == pytest.approx(attention * (7 / 6) / 2)


@pytest.mark.parametrize(
    "model",
    [
        {"z_loss": 1e-4, "logit_softcap": 30.0},
        pytest.param(
            {"kind": "egpt", "tied_embeddings": False, "egpt": EGPTConfig(token_memory=True)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_head_moves_few_bytes_a_logit_between_its_products(model: dict[str, Any]) -> None:
    """Each of its operators reads bf16 logits once, and the second writes them: 6 bytes. What is
    above is by row, and by weight: it is added up over portions of rows.
    """
    config = _gpt(**{"vocab_size": 50257, "max_seq_len": 1024, **model})
    roofline = _roofline(config)
    assert roofline.bytes_a_logit(fused=False) > 50
    assert 6 < roofline.bytes_a_logit() < 10


@pytest.mark.parametrize("key", ["tensor_parallel_size", "context_parallel_size"])
def test_ranks_that_share_samples_move_as_few_bytes_a_logit(key: str) -> None:
    config = _gpt(8, vocab_size=50257, max_seq_len=1024)
    parallel = dataclasses.replace(config.parallel, **{key: 4})
    roofline = _roofline(dataclasses.replace(config, parallel=parallel), 4)
    assert roofline.bytes_a_logit(fused=False) > 50
    assert 6 < roofline.bytes_a_logit() < 10


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt", "egpt"])
def test_ranks_that_share_the_tokens_of_a_sample_reach_about_the_mfu_of_one(kind: str) -> None:
    """A little less: each reads all weights for fewer tokens."""
    sizes = {"vocab_size": 5000, "max_seq_len": 2048, "hidden_size": 2048, "num_heads": 16}
    config = _gpt(4, kind=kind, **sizes, num_layers=1, positions="rotary")
    parallel = dataclasses.replace(config.parallel, context_parallel_size=2)
    one, shared = _roofline(config), _roofline(dataclasses.replace(config, parallel=parallel), 2)
    most, reached = one.mfu(), shared.mfu()
    assert most is not None
    assert reached is not None
    assert 0.9 * most < reached < most


@pytest.mark.long
def test_ceilings_of_gpt2_are_above_what_is_aimed_at() -> None:
    """With the head's operators compiled and the blocks' own operators."""
    least = {"124M": 0.505, "355M": 0.535, "774M": 0.55, "1558M": 0.56}
    for name, config in gpt2_runs().items():
        roofline = _roofline(config)
        ceilings = [roofline.mfu("eager", fused_head=False), roofline.mfu("eager")]
        ceilings += [roofline.mfu("compiled"), roofline.mfu("fused")]
        found = [mfu for mfu in ceilings if mfu is not None]
        assert len(found) == 4
        assert found == sorted(set(found))
        assert found[-1] > least[name.removeprefix("GPT-2 ")]


def test_a_block_moves_57_numbers_a_token_and_column_and_17_by_its_own_operators() -> None:
    """Beside its products and its attention, in bf16; sums over the rows are little beside them."""
    roofline = _roofline(_gpt(8, vocab_size=500, max_seq_len=8192, hidden_size=256))
    assert roofline.fused is not None
    numbers = roofline.tokens * 256 * 2 * 2  # of two bytes, in two blocks
    assert roofline.rest.bytes / numbers == pytest.approx(57, abs=0.5)
    assert roofline.fused.rest.bytes / numbers == pytest.approx(17, abs=0.5)


def test_products_with_gelu_are_products() -> None:
    roofline = _roofline(_gpt())
    assert roofline.fused is not None
    own = 2 * 2 * roofline.tokens * 64 * 256  # layers, multiplications and additions
    assert roofline.fused.own_products.flops == 2 * own
    assert roofline.fused.products.flops + 2 * own == roofline.products.flops


@pytest.mark.parametrize("model", [{"norm": "rms_norm"}, {"positions": "rotary"}])
def test_blocks_without_own_operators_are_as_fast_as_compiled_ones(model: dict[str, Any]) -> None:
    roofline = _roofline(_gpt(**model))
    assert roofline.fused is None
    assert roofline.slowness is None
    assert roofline.seconds() == roofline.seconds("compiled")


@pytest.mark.long
@pytest.mark.parametrize("window_every", [2, 3])
def test_what_lies_outside_of_blocks_does_not_go_by_how_many_are_windowed(
    window_every: int,
) -> None:
    model = {"num_layers": 3, "window": 8}
    mixed, all_windowed = (
        _roofline(_gpt(**model, window_every=window_every)),
        _roofline(_gpt(**model)),
    )
    assert mixed.outside.bytes == all_windowed.outside.bytes
    assert mixed.outside.kernels == all_windowed.outside.kernels


def test_what_lies_outside_of_blocks_does_not_go_by_which_are_frozen() -> None:
    config = _gpt()
    training = dataclasses.replace(config.training, freeze=("layers:1",))
    plain, frozen = _roofline(config), _roofline(dataclasses.replace(config, training=training))
    assert frozen.outside.bytes == plain.outside.bytes
    assert frozen.rest.bytes < plain.rest.bytes


def test_a_run_with_frozen_parts_has_no_mfu() -> None:
    """Operations are counted as if everything were trained."""
    plan = make_plan(_gpt(), Machines(find_accelerator("h100", 1), 1, 1))
    roofline = Roofline(
        dataclasses.replace(plan, size=dataclasses.replace(plan.size, frozen=1)),
        *(1, Cost(), Cost(), Cost(), Cost(), Cost(seconds=1.0), None, Cost(), 0.0),
    )
    assert roofline.mfu() is None
    assert dataclasses.replace(roofline, plan=plan).mfu() is not None


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (64, 64)])
def test_muons_products_are_those_of_its_iterations(shape: tuple[int, int]) -> None:
    counter, matrix = OperatorCosts(0, _RATES), Matrix(*shape, size=0)
    with counter:
        orthogonalized(torch.zeros(shape, dtype=torch.bfloat16, device="meta"))
    r, c = sorted(shape)
    assert operations(matrix) == 5 * (4 * r**2 * c + 2 * r**3)
    products, cost = counter.costs["products"], iteration_cost(matrix, _RATES)
    assert (cost.kernels, cost.flops, cost.bytes) == (15, operations(matrix), products.bytes)
    assert (products.kernels, products.flops) == (cost.kernels, cost.flops)
    assert cost.seconds == pytest.approx(products.seconds)


def test_a_product_that_is_added_in_place_is_a_product() -> None:
    counter = OperatorCosts(1000, _RATES)
    total, a, b = (torch.zeros(512, 512) for _ in range(3))
    with counter:
        total.addmm_(a, b)
    products = counter.costs["products"]
    assert (products.flops, products.bytes) == (2 * 512**3, 4 * a.nbytes)
    assert not counter.costs["rest"].kernels


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "share"),
    [
        ({}, COMPILED_GPT2),
        (
            {
                "norm": "rms_norm",
                "mlp": "swiglu",
                "bias": False,
                "positions": "rotary",
                "ffn_hidden_size": 704,
            },
            COMPILED_LLAMA,
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_compiled_blocks_move_the_stated_share_of_bytes_by_inductors_count(
    model: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that its kernels read and write, but for products and attention, on a CPU."""
    sizes = {"vocab_size": 300, "max_seq_len": 512, "hidden_size": 256, "num_heads": 4}
    config = RunConfig(
        model=ModelConfig(**{**sizes, "num_layers": 1, **model}),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=1),
    )
    moved = []

    def count_bytes(graph: GraphLowering) -> Any:
        total, nodes, times = counted(graph)
        moved.extend(4 * n for node, n in nodes if not isinstance(node, ExternKernelSchedulerNode))
        return total, nodes, times

    counted = GraphLowering.count_bytes
    monkeypatch.setattr(GraphLowering, "count_bytes", count_bytes)
    torch.compiler.reset()
    torch._logging.set_logs(inductor_metrics=True)  # or it does not count
    try:
        gpt = build_model(config.model, ProcessGrid()).bfloat16()
        gpt.stack.compile_blocks()
        tokens = torch.zeros(1, 512, dtype=torch.int64)
        with inductor_config.patch(force_disable_caches=True):  # what is cached is not counted
            gpt(tokens, tokens).backward()
    finally:
        torch._logging.set_logs()
        torch.compiler.reset()
    assert sum(moved) / _roofline(config).rest.bytes == pytest.approx(share, abs=0.015)


def test_a_gpu_whose_speed_is_not_known_is_refused() -> None:
    plan = make_plan(_gpt(), Machines(find_accelerator("cpu", 1), 1, 1))
    with pytest.raises(ConfigError, match="--roofline needs a GPU and a precision of the table"):
        make_roofline(plan)
