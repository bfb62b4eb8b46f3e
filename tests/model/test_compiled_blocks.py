"""What compiled blocks are made of, counted by back-ends that compile nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from megaegpt.config import ModelConfig
from megaegpt.model.build import Model, build_model
from megaegpt.parallel.grid import ProcessGrid

LAYERS = 12
MODEL = ModelConfig(
    vocab_size=64, max_seq_len=256, hidden_size=32, num_layers=LAYERS, num_heads=2, init_std=0.1
)
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _pass(model: Model, width: int) -> Tensor:
    tokens = torch.arange(2 * (width + 1)).view(2, -1) % MODEL.vocab_size
    loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
    loss.backward()
    return loss.detach()


def test_blocks_of_changing_widths_are_compiled_whole_and_twice_at_most() -> None:
    """Once for the first width, and once for all others."""
    graphs = []

    def count(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = build_model(MODEL, ProcessGrid())
    model.stack.compile_blocks(backend=count, fullgraph=True)
    for width in (40, 48, 56, 64, 72, 80, 88, 96):
        _pass(model, width)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "kind",
    [{}, {"attention": "latent", "latent_dim": 16, "rope_head_dim": 8}],
    ids=["multi_head", "latent"],
)
def test_evaluated_blocks_share_code(kind: dict[str, Any]) -> None:
    """An encoder's blocks are nothing but evaluated."""
    graphs = []

    def count(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    config = dataclasses.replace(MODEL, **kind, positions="rotary", dropout=0.1)
    model = build_model(config, ProcessGrid()).eval()
    model.stack.compile_blocks(backend=count, fullgraph=True)
    with torch.no_grad():
        model.hidden_states(torch.arange(80).view(2, -1) % MODEL.vocab_size)
    assert len(graphs) == 1


def _counted_products(recompute: Any) -> tuple[float, Counter[str], dict[str, Tensor]]:
    """Loss, matrix products by the pass whose compiled code runs them, gradients."""
    ran: Counter[str] = Counter()
    passes = ["forward"]

    def compiler(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        products = sum(node.target in PRODUCTS for node in graph.graph.nodes)

        def run(*inputs: Any) -> Any:
            ran[passes[-1]] += products
            return graph(*inputs)

        return run

    def compile_graph(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return make_boxed_func(compiler(graph, inputs))

    model = build_model(MODEL, ProcessGrid(), activation_checkpointing=recompute)
    backend = aot_autograd(fw_compiler=compile_graph, bw_compiler=compile_graph)
    model.stack.compile_blocks(backend=backend)
    tokens = torch.arange(66).view(2, -1) % MODEL.vocab_size
    loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
    passes.append("backward")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), ran, gradients


def test_selective_checkpointing_of_compiled_blocks_recomputes_no_product() -> None:
    """The backward pass of a product is two products."""
    expected_loss, plain, expected = _counted_products("none")
    loss, selective, gradients = _counted_products("selective")
    assert plain["forward"] >= 4 * LAYERS
    assert plain["backward"] == 2 * plain["forward"]
    assert selective == plain
    assert _counted_products("full")[1]["backward"] > plain["backward"]
    assert loss == expected_loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
