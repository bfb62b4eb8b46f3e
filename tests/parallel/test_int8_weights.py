"""Products with int8 weights are those with the numbers that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.parallel.int8_weights import MOST_ROWS, Int8Weight, int8_weight
from megaegpt.parallel.matmul import linear


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _exact(weight: Int8Weight) -> Tensor:
    return weight.values.double() * weight.scales.double().unsqueeze(1)


def test_a_number_is_off_by_half_a_step_of_its_row_at_most() -> None:
    weight = _draw(300, 64, seed=1) * torch.logspace(-6, 6, 300).unsqueeze(1)
    weight[7] = 0
    rounded = int8_weight(weight)
    step = weight.abs().amax(1, keepdim=True).double() / 127
    assert rounded.values.abs().max() == 127
    off = (_exact(rounded) - weight).abs()
    assert (off <= step * (0.5 + 2**-8)).all()  # a step is rounded to bf16
    assert torch.equal(_exact(rounded)[7], torch.zeros(64, dtype=torch.float64))


def test_rows_may_lie_in_any_order() -> None:
    weight = int8_weight(_draw(64, 32, seed=2))
    x, nothing = _draw(32, 4, seed=3).T, torch.full((64, 32), torch.nan)
    assert torch.equal(linear(x, nothing, None, weight), linear(x.clone(), nothing, None, weight))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "unit"),
    [
        ((1,), 768, 2**-8),  # bf16's
        ((2, 3), 96, 2**-8),
        ((MOST_ROWS,), 32, 2**-8),
        ((MOST_ROWS + 1,), 768, 2**-21),
        ((1,), 40, 2**-21),  # no whole number of vectors
        ((2, 300), 24, 2**-21),
        ((0,), 32, 0),
    ],
)
def test_a_product_is_as_near_to_the_exact_one_as_its_type_comes(
    rows: tuple[int, ...], inputs: int, unit: float, bias: bool
) -> None:
    weight = int8_weight(_draw(2051, inputs, seed=2))  # of which there are two parts at 768
    x = _draw(*rows, inputs, seed=3)
    b = _draw(2051, seed=4) if bias else None
    y = linear(x, torch.full((2051, inputs), torch.nan), b, weight)
    assert y.dtype == torch.float32
    exact = F.linear(x.double(), _exact(weight), None if b is None else b.double())
    # Each rounding is of a term or of the sum: together they are no more than the terms' sizes.
    terms = F.linear(
        x.double().abs(), _exact(weight).abs(), None if b is None else b.double().abs()
    )
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= unit * terms).all()


def test_rows_are_looked_up_as_they_are_multiplied_by() -> None:
    weight = int8_weight(_draw(50, 24, seed=5))
    indices = torch.tensor([[3, 49], [0, 3]])
    found = weight.embedding(indices, torch.float64)
    assert torch.equal(found, _exact(weight)[indices])
    assert torch.equal(weight.whole(torch.float64), _exact(weight))


def test_numbers_that_are_none_stay_so() -> None:
    weight = _draw(4, 32, seed=6)
    weight[1, 3], weight[2, 5] = torch.nan, torch.inf
    y = linear(torch.ones(1, 32), weight, None, int8_weight(weight))
    assert y.isfinite().tolist() == [[True, False, False, True]]
