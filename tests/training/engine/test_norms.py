"""Norms of gradients of many numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.engine.fewer_operators import use_fewer_operators
from megaegpt.training.engine.gradients import ModuleNorms
from megaegpt.training.engine.norms import sum_of_squares
from megaegpt.training.engine.optimizer import gradient_norm


def test_norms_of_large_gradients_are_not_too_small() -> None:
    """In one fp32 sum on a CPU this one would be by more than ten times the tolerance."""
    size, grid = 2**24, ProcessGrid()
    model = nn.Linear(2**12, size // 2**12, bias=False)
    model.weight.grad = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(0))
    right = pytest.approx(model.weight.grad.double().norm().item(), rel=3e-5)
    optimizer = SimpleNamespace(
        bf16_groups=[[model.weight]],
        fp32_groups_gradients=[[model.weight.grad]],
        fp32_groups_has_gradients=[[True]],
    )
    use_fewer_operators(optimizer, grid)
    [of_stage_1], _ = optimizer.get_grads_for_norm()
    assert of_stage_1.item() == right
    assert gradient_norm(model.parameters(), grid).item() == right
    assert ModuleNorms(model, None, grid).measure(1.0).tolist() == [right]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_of_squares_are_those_of_fp64(dtype: torch.dtype) -> None:
    """Also of a part of nothing, of one that ends inside a piece, and of one with strides."""
    drawn = torch.randn(300, 999, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = [drawn, drawn.t(), drawn[:0], drawn[3, 4]]
    right = sum(tensor.double().square().sum().item() for tensor in tensors)
    assert sum_of_squares(tensors, torch.device("cpu")).item() == pytest.approx(right, rel=1e-13)
    assert sum_of_squares([], torch.device("cpu")).item() == 0.0


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_sum_of_squares(wrong: float) -> None:
    gradient = torch.zeros(200_000)
    gradient[-1] = wrong
    assert not sum_of_squares([gradient], torch.device("cpu")).isfinite()
