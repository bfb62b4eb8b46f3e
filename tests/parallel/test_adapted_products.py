"""Products with frozen weights and adapters, against sums of separate products in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megaegpt.parallel.adapted_products import AdaptedFactors, adapted_products

SCALE = 0.5


def layers_of(
    outputs: list[int], ranks: list[int], bias: bool
) -> tuple[list[AdaptedFactors], list[Tensor]]:
    """Layers of 12 inputs, and the factors that learn."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    layers = [
        AdaptedFactors(
            random(size, 12),
            random(size) if bias else None,
            random(rank, 12).requires_grad_(),
            random(size, rank).requires_grad_(),
        )
        for size, rank in zip(outputs, ranks, strict=True)
    ]
    return layers, [factor for layer in layers for factor in (layer.a, layer.b)]


def separate_products(x: Tensor, layers: list[AdaptedFactors]) -> list[Tensor]:
    """By the definition."""
    outputs = []
    for weight, bias, a, b in layers:
        y = x @ (weight + SCALE * (b @ a)).T
        outputs.append(y if bias is None else y + bias)
    return outputs


@pytest.mark.parametrize(
    ("outputs", "ranks", "bias"), [([7], [3], False), ([8, 4, 4], [2, 2, 5], True)]
)
@pytest.mark.parametrize("learned_input", [True, False])
def test_adapted_products_are_those_of_the_merged_weights_with_their_gradients(
    outputs: list[int], ranks: list[int], bias: bool, learned_input: bool
) -> None:
    torch.manual_seed(1)
    layers, factors = layers_of(outputs, ranks, bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=learned_input)
    wanted = separate_products(x, layers)
    found = adapted_products(x, layers, SCALE)
    torch.testing.assert_close(list(found), wanted, rtol=1e-12, atol=1e-12)
    by_outputs = [torch.randn_like(y) for y in wanted]
    sources = [*factors, x] if learned_input else factors
    torch.testing.assert_close(
        torch.autograd.grad(found, sources, by_outputs),
        torch.autograd.grad(wanted, sources, by_outputs),
        rtol=1e-12,
        atol=1e-12,
    )


def test_adapters_may_be_given_an_input_of_their_own() -> None:
    torch.manual_seed(3)
    layers, factors = layers_of([7], [3], bias=True)
    (weight, bias, a, b), scale = layers[0], SCALE
    x, dropped = torch.randn(2, 2, 5, 12, dtype=torch.float64).requires_grad_()
    assert bias is not None
    wanted = x @ weight.T + bias + scale * (dropped @ a.T @ b.T)
    (found,) = adapted_products(x, layers, scale, dropped)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    by_output = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, dropped, *factors], by_output),
        torch.autograd.grad(wanted, [x, dropped, *factors], by_output),
        rtol=1e-12,
        atol=1e-12,
    )


def test_kept_by_selective_recomputation_they_are_multiplied_once() -> None:
    torch.manual_seed(2)
    layers, factors = layers_of([6, 6], [2, 2], bias=False)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    seen = []

    def keep(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        seen.append(op)
        kept = op == torch.ops.megaegpt.adapted_products.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def loss(x: Tensor) -> Tensor:
        first, second = adapted_products(x, layers, SCALE)
        return (first.tanh() * second).sum()

    recomputed = checkpoint(
        loss, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep)
    )
    found = torch.autograd.grad(recomputed, [x, *factors])
    wanted = torch.autograd.grad(loss(x), [x, *factors])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert torch.ops.megaegpt.adapted_products.default in seen
    assert not any("mm" in str(op) for op in seen)
