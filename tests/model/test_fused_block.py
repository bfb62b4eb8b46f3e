"""Blocks by operators of their own: the same loss and gradients, and when they are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaegpt.config import LoRAConfig, ModelConfig
from megaegpt.model.build import build_model
from megaegpt.model.gpt import GPT
from megaegpt.parallel.grid import ProcessGrid

_SIZES = {
    "vocab_size": 100, "max_seq_len": 24, "hidden_size": 16, "num_layers": 2, "num_heads": 4
}  # fmt: skip


def _model(fused: bool | None = True, recompute: Any = "none", **config: Any) -> GPT:
    """In fp64, without a parameter that is zero."""
    model = build_model(
        ModelConfig(**{**_SIZES, **config}), ProcessGrid(), activation_checkpointing=recompute
    ).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(noise, alpha=0.1)
    model.stack.fused = fused
    assert isinstance(model, GPT)
    return model


def _tokens() -> Tensor:
    return torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(1))


def _loss_and_gradients(model: GPT) -> list[Tensor]:
    loss = model(_tokens(), _tokens().roll(-1))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [loss, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "config",
    [{}, {"bias": False, "num_kv_heads": 1}, {"activation": "gelu", "window": 8}],
    ids=["gpt2", "grouped without biases", "exact gelu in a window"],
)
def test_loss_and_gradients_are_those_of_the_blocks(config: dict[str, Any], recompute: Any) -> None:
    found = _loss_and_gradients(_model(True, recompute, **config))
    expected = _loss_and_gradients(_model(False, **config))
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-11)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _is_fused(model: GPT) -> bool:
    names = _Names()
    with names:
        model(_tokens(), _tokens())
    return "product_gelu" in names.seen


@pytest.mark.parametrize(
    "config",
    [
        {"positions": "rotary"},
        {"mlp": "swiglu"},
        {"norm": "rms_norm"},
        {"norm_placement": "post"},
        {"qk_norm": "head"},
        {"attention": "latent"},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_blocks_with_anything_else_are_left_to_the_compiler(config: dict[str, Any]) -> None:
    assert _is_fused(_model())
    assert not _is_fused(_model(**config))


def test_blocks_are_fused_in_training_alone_and_on_a_gpu_unless_it_is_asked_for() -> None:
    assert not _is_fused(_model(None))
    assert not _is_fused(_model(recompute="selective"))
    assert _is_fused(_model(dropout=0.1).eval())
    with torch.no_grad():
        assert not _is_fused(_model())


def test_adapters_are_not_passed_over() -> None:
    model = _model()
    model.stack.blocks[1].mlp.down.add_adapter(LoRAConfig(rank=2))
    model.stack.blocks[1].mlp.down.lora.double()
    assert _is_fused(model)  # by the first block
    model.stack.blocks[0].attention.query.add_adapter(LoRAConfig(rank=2))
    model.stack.blocks[0].attention.query.lora.double()
    assert not _is_fused(model)


def test_compiled_blocks_are_left_aside_where_their_own_operators_are_taken() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = _model()
    model.stack.compile_blocks(backend=backend)
    expected = _loss_and_gradients(_model())
    for ours, plain in zip(_loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert not compiled
    model.stack.fused = False
    _loss_and_gradients(model)
    assert compiled
    torch.compiler.reset()
