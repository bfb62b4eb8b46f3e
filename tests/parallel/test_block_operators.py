"""Operators of a block: their gradients against autograd's, their kernels against themselves.

The kernels run in Triton's interpreter, where Triton is installed, and are compiled for an H100
without one; a GPU runs them in ``tests/gpu``.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaegpt.parallel import block_operators
from megaegpt.parallel.block_operators import (
    add_gelu_mlp_,
    add_product_,
    check_kernels,
    kernel_problem,
    norm_and_shift,
    norm_and_shift_backward,
    normed_and_shifted,
    product_gelu,
    product_gelu_backward,
    project,
)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not _HAS_TRITON, reason="needs Triton")


def _plain_norm(x: Tensor, weight: Tensor, bias: Any, shift: Any) -> tuple[Tensor, ...]:
    shifted = x * 1.0 if shift is None else x + shift
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5), shifted


def _plain_mlp(residual: Tensor, x: Tensor, up: Tensor, bias: Any, down: Tensor) -> Tensor:
    return residual + F.gelu(x @ up.t() + (0 if bias is None else bias)) @ down.t()


def _plain_projections(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight, bias) for weight, bias in layers)


def _pairs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function that takes pairs, one that takes what is in them."""
    return lambda x, *parts: function(x, *zip(parts[::2], parts[1::2], strict=True))


_IN_PLACE = {"add_product_", "add_gelu_mlp_"}
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...] | None]]] = {
    "norm": (
        lambda *a: normed_and_shifted(*a, 1e-5),
        _plain_norm,
        [(2, 5, 6), (6,), (6,), (6,)],
    ),
    "norm without biases": (
        lambda *a: normed_and_shifted(*a, 1e-5),
        _plain_norm,
        [(2, 5, 6), (6,), None, None],
    ),
    "add_product_": (
        add_product_,
        lambda residual, x, weight: residual + x @ weight.t(),
        [(2, 5, 6), (2, 5, 4), (6, 4)],
    ),
    "add_gelu_mlp_": (
        lambda *a: add_gelu_mlp_(*a, tanh=False),
        _plain_mlp,
        [(2, 5, 6), (2, 5, 6), (8, 6), (8,), (6, 8)],
    ),
    "projections": (
        _pairs(project),
        _pairs(_plain_projections),
        [(2, 5, 6), (8, 6), (8,), (4, 6), (4,), (4, 6), None],
    ),
}


def _inputs(shapes: list[tuple[int, ...] | None], seed: int = 0) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return [None if shape is None else draw(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_results_and_all_gradients_are_those_of_plain_operators(name: str) -> None:
    ours, plain, shapes = CASES[name]
    found = []
    for function in (ours, plain):
        inputs = _inputs(shapes)
        given = list(inputs)
        if name in _IN_PLACE and given[0] is not None:
            given[0] = given[0] * 1.0  # a leaf may not be changed
        results = function(*given)
        results = results if isinstance(results, tuple) else (results,)
        factors = _inputs([tuple(result.shape) for result in results], seed=1)
        torch.autograd.backward(results, [f.detach() for f in factors if f is not None])
        found.append([*results, *(x.grad for x in inputs if x is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    function, _, shapes = CASES[name]
    inputs = _inputs(shapes)
    activations = 2 if name in _IN_PLACE else 1
    for parameter in inputs[activations:]:
        if parameter is not None:
            parameter.requires_grad_(False)
    results = function(*(x * 1.0 if x is not None and x.dim() == 3 else x for x in inputs))
    torch.cat([r.flatten() for r in (results if isinstance(results, tuple) else (results,))]).sum(
    ).backward()  # fmt: skip
    assert all(x.grad is not None for x in inputs[:activations] if x is not None)


def test_what_is_added_takes_the_residuals_place() -> None:
    residual, x, weight = (torch.randn(shape) for shape in ((3, 6), (3, 4), (6, 4)))
    assert add_product_(residual, x, weight).data_ptr() == residual.data_ptr()


def test_bf16_is_rounded_once_from_fp32() -> None:
    check_kernels("cpu")


def test_kernels_that_are_not_there_or_compute_something_else_are_not_used(monkeypatch) -> None:
    kernel_problem.forget()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernel_problem("cpu") == "Triton is not installed"
    kernel_problem.forget()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert kernel_problem("cpu") is None
    kernel_problem.forget()
    wrong = [lambda *a: tuple(1.1 * x for x in product_gelu(*a)), product_gelu]
    monkeypatch.setattr(
        block_operators,
        "product_gelu",
        lambda x, *a: wrong[x.dtype == torch.float32](x, *a),
    )
    assert str(kernel_problem("cpu")).startswith("AssertionError: Tensor-likes are not close")
    kernel_problem.forget()

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(block_operators, "product_gelu", fail)
    assert kernel_problem("cpu") == "RuntimeError: RuntimeError"  # it says nothing
    kernel_problem.forget()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton runs kernels by NumPy; it has to be told before it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()
            yield pool
    finally:
        del os.environ["TRITON_INTERPRET"]


def _by_kernels(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    from megaegpt.parallel import block_kernels

    return getattr(block_kernels, name)(*arguments)


def _of_kernels(dtype: torch.dtype) -> dict[str, tuple[str, Any, tuple[Any, ...]]]:
    """Sizes are not whole tiles, and more rows than parts of sums."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, grad, along = (draw(531, 20).to(dtype) for _ in range(3))
    weight, bias = draw(20).to(dtype), draw(20).to(dtype)
    rows, up, before = draw(130, 40).to(dtype), draw(136, 40).to(dtype), draw(130, 136).to(dtype)
    means, scales = norm_and_shift(x, weight, None, None, 1e-5)[2:]
    down = up.t().contiguous()
    norm, backward = "launch_norm", "launch_norm_backward"
    gelu, gelu_backward = "launch_product_gelu", "launch_product_gelu_backward"
    more = (means, scales)
    return {
        "norm": (norm, norm_and_shift, (x[:9], weight, bias, bias, 1e-5)),
        "norm without biases": (norm, norm_and_shift, (x[:9], weight, None, None, 1e-5)),
        "norm backward": (backward, norm_and_shift_backward, (grad, along, x, weight, *more)),
        "gelu": (gelu, product_gelu, (rows, up, before[0], True)),
        "exact gelu": (gelu, product_gelu, (rows, up, None, False)),
        "gelu backward": (gelu_backward, product_gelu_backward, (rows, down, before, True)),
        "exact backward": (gelu_backward, product_gelu_backward, (rows, down, before, False)),
    }


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["fp32", "fp16"]
)
@pytest.mark.parametrize("name", _of_kernels(torch.float32))
def test_kernels_compute_what_the_operators_do(
    interpreter: ProcessPoolExecutor, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    launch, operator, arguments = _of_kernels(dtype)[name]
    found = interpreter.submit(_by_kernels, launch, arguments).result()
    expected = operator(*arguments)
    for ours, plain in zip(found, expected, strict=True):
        if ours.shape != plain.shape:  # parts of sums
            ours, plain = ours.sum(0), plain.sum(0)
        atol = tolerance * float(plain.abs().max())
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=atol)
