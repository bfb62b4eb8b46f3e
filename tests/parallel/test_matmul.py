"""oneDNN's products are the plain ones, in values and gradients, as exactly as fp32 allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.parallel import matmul
from megaegpt.parallel.matmul import linear, onednn_is_available, packed_order

ROWS = [(1,), (5,), (2, 3), (300,)]


def _draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _computed(
    product: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    change: Callable[[Tensor], Tensor] = torch.clone,
) -> list[Tensor]:
    """Output and gradients in ``dtype``, for a fixed gradient of the output, changed as said."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    y = product(*leaves)
    y.backward(change(_draw(*y.shape, seed=9)).to(dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


_UNIT, _DEVIATIONS = 2.0**-24, 8
"""fp32's rounding error; how often the usual error of a sum of roundings may be exceeded."""


def _fp32_errors(inputs: list[Tensor]) -> list[Tensor]:
    """How far fp32 may be from the exact output and gradients, on any processor.

    A sum of n products is, in any order, within sqrt(n) u sum(|a| |b|) but for a factor that is
    above 8 once in 10^13 sums (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 3.1), and
    the rounding of a, b and what is added to the sum cost one u each.
    """

    x, weight = inputs[:2]
    rows = x.numel() // x.shape[-1]
    lengths = [x.shape[-1], weight.shape[0], rows, rows][: 1 + len(inputs)]
    sums = _computed(F.linear, [i.abs() for i in inputs], torch.float64, torch.abs)
    return [
        (_DEVIATIONS * n**0.5 + 3) * _UNIT * of_terms
        for n, of_terms in zip(lengths, sums, strict=True)
    ]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_as_near_to_fp64_as_fp32_comes(
    rows: tuple[int, ...], bias: bool
) -> None:
    inputs = [_draw(*rows, 512, seed=1), _draw(768, 512, seed=2)] + bias * [_draw(768, seed=3)]
    exact = _computed(F.linear, inputs, torch.float64)
    ours = _computed(linear, inputs, torch.float32)
    for wanted, found, error in zip(exact, ours, _fp32_errors(inputs), strict=True):
        assert found.shape == wanted.shape
        assert ((found - wanted).abs() <= error).all()


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = _draw(4, 512, seed=1).float(), _draw(512, 512, seed=2).float()
    x.requires_grad_()
    linear(x, weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, 512), rtol=1e-5, atol=1e-4)


def test_rows_and_weights_may_be_views() -> None:
    x, weight = _draw(512, 5, seed=1).float().t(), _draw(512, 513, seed=2).float().t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-4)
    assert linear(x[:0], weight).shape == (0, 513)


@pytest.mark.skipif(
    not onednn_is_available(torch.bfloat16), reason="oneDNN needs AVX-512 for products in bf16"
)
def test_a_packed_weight_gives_the_same_in_bf16() -> None:
    x, weight, bias = (_draw(*s, seed=1).bfloat16() for s in ((3, 64), (32, 64), (32,)))
    packed = packed_order(weight)
    assert packed is not None
    torch.testing.assert_close(linear(x, weight, bias, packed), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512,), (1, 1, 512), (3, 512), (2, 2, 512), (5, 512), (0, 512)])
@pytest.mark.parametrize("outputs", [768, 769, 770])
def test_compiled_code_gets_the_same_product(
    dtype: torch.dtype, shape: tuple[int, ...], outputs: int
) -> None:
    """Few rows' is written out for the compiler, which leaves a packed weight alone."""
    x, weight, bias = (_draw(*s, seed=1) for s in (shape, (outputs, 512), (outputs,)))
    low = [tensor.to(dtype) for tensor in (x, weight, bias)]
    packed = packed_order(low[1])
    torch.compiler.reset()
    compiled = torch.compile(lambda x: linear(x, *low[1:], packed), backend="eager", fullgraph=True)
    with torch.inference_mode():
        y = compiled(low[0])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    exact = F.linear(x, weight, bias)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * 20)


def test_a_build_without_onednn_is_not_asked_for_its_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor for what they need of the processor: the question is not there either."""
    monkeypatch.setattr(matmul, "HAS_ONEDNN", False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    weight = _draw(768, 512, seed=2)
    assert packed_order(weight.bfloat16()) is None
    x = _draw(3, 512, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), weight.to(dtype)
        assert torch.equal(linear(a, b), F.linear(a, b))


def test_in_fp32_nothing_is_packed() -> None:
    assert packed_order(torch.ones(4, 4)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_told_take_the_plain_product_but_for_gradients(dtype: torch.dtype) -> None:
    weight, bias = (_draw(*shape, seed=2).to(dtype) for shape in ((768, 512), (768,)))
    packed = packed_order(weight)
    for rows in (1, 2, 3):
        x = _draw(rows, 512, seed=1).to(dtype)
        with torch.no_grad():
            y = linear(x, weight, bias, packed, frozenset({1, 3}))
        if rows != 2:
            assert torch.equal(y, F.linear(x, weight, bias))
        torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=2e-2, atol=1e-3)
    weight.requires_grad_()
    linear(x, weight, blas_rows=frozenset({3})).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(768, 512), rtol=2e-2, atol=1e-3)
