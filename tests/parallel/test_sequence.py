"""Tokens cut over two ranks, against the same tokens on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaegpt.parallel import sequence
from megaegpt.parallel.gathered_products import gathered_products
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.scattered_product import scattered_product
from megaegpt.parallel.sequence import SequenceShards, dropout
from tests.distributed.harness import Distributed, grid_for

WIDTH = 4


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def shards_of(batch: int, length: int) -> SequenceShards:
    return SequenceShards(grid_for(2), batch, length)


def own_rows(x: Tensor, shards: SequenceShards) -> Tensor:
    """From the definition, with zeros behind the last token."""
    rows = x.flatten(0, 1)
    rows = torch.cat([rows, rows.new_zeros(2 * shards.rows - len(rows), *rows.shape[1:])])
    return rows.chunk(2)[shards.grid.tp_rank]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check_ways_between(batch: int, length: int) -> None:
    shards = shards_of(batch, length)
    rank = shards.grid.tp_rank
    parts = [random(batch, length, WIDTH, seed=seed) for seed in (0, 1)]  # of each rank
    weights = random(batch, length, WIDTH, seed=2)
    bias = random(WIDTH, seed=3).requires_grad_()

    part = parts[rank].clone().requires_grad_()
    own = shards.scatter(part, bias)
    assert_close(shards.whole(own), sum(parts) + bias)
    (shards.whole(own) * weights).sum().backward()
    assert part.grad is not None
    assert bias.grad is not None
    assert_close(part.grad, weights)
    assert_close(bias.grad, weights.sum((0, 1)))

    x = own_rows(parts[0], shards).clone().requires_grad_()
    everything = shards.gather(x)
    assert_close(everything, parts[0])
    (everything * parts[rank]).sum().backward()  # ranks use it differently
    assert x.grad is not None
    assert_close(x.grad, own_rows(parts[0] + parts[1], shards))
    assert shards.own(parts[0]).equal(own_rows(parts[0], shards))


@pytest.mark.parametrize(("batch", "length"), [(2, 3), (3, 3), (1, 1)])
def test_tokens_are_cut_summed_and_gathered(
    distributed: Distributed, batch: int, length: int
) -> None:
    distributed(2, check_ways_between, batch, length)


def check_parameters() -> None:
    shards = shards_of(3, 3)
    x, weights = random(3, 3, WIDTH), random(3, 3, WIDTH, seed=1)
    scale, shift, frozen = (random(WIDTH, seed=seed).requires_grad_(seed < 4) for seed in (2, 3, 4))
    used, nothing, added, fixed = shards.shared(scale, None, shift, frozen)
    assert nothing is None
    assert used is not None
    assert added is not None
    assert fixed is not None
    y = (shards.own(x) * used + added) * fixed
    (y * shards.own(weights)).sum().backward()
    assert scale.grad is not None
    assert shift.grad is not None
    assert frozen.grad is None
    assert_close(scale.grad, (x * weights * frozen).sum((0, 1)))
    assert_close(shift.grad, (weights * frozen).sum((0, 1)))


def test_gradients_of_shared_parameters_are_summed(distributed: Distributed) -> None:
    distributed(2, check_parameters)


def check_dropout() -> None:
    shards, x = shards_of(3, 3), random(3, 3, WIDTH)
    torch.manual_seed(1)
    whole, next_number = F.dropout(x, 0.4), torch.rand(())
    torch.manual_seed(1)
    own = dropout(shards.own(x), 0.4, True, shards)
    assert own.equal(own_rows(whole, shards))
    assert torch.rand(()) == next_number
    assert dropout(shards.own(x), 0.4, False, shards).equal(shards.own(x))


def test_a_token_loses_the_numbers_that_it_loses_whole(distributed: Distributed) -> None:
    distributed(2, check_dropout)


def check_products() -> None:
    shards = shards_of(3, 3)
    rank, x = shards.grid.tp_rank, random(3, 3, WIDTH)
    first, second = (random(5, WIDTH, seed=10 * rank + seed) for seed in (1, 2))
    bias, along = random(5, seed=3), random(3, 3, 5, seed=4)
    results = []
    for cut in (False, True):
        given = own_rows(x, shards).clone().requires_grad_()
        used, frozen, shift = first.clone().requires_grad_(), second, bias.clone().requires_grad_()
        if cut:
            y, z = gathered_products(given, [(used, shift), (frozen, None)], shards)
        else:
            tokens = shards.gather(given)
            y, z = F.linear(tokens, used, shift), F.linear(tokens, frozen)
        (y * along + z).sum().backward()
        results.append((y.detach(), z.detach(), given.grad, used.grad, shift.grad))
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        assert found is not None
        assert_close(found, expected)


def check_scattered_product(frozen: bool) -> None:
    shards = shards_of(3, 3)
    rank = shards.grid.tp_rank
    x, weight, bias = random(3, 3, 5, seed=rank), random(WIDTH, 5, seed=2 + rank), random(WIDTH)
    along, results = shards.own(random(3, 3, WIDTH, seed=5)), []
    for written in (False, True):
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        shift = bias.clone().requires_grad_()
        if written:
            y = scattered_product(*given, shift, shards)
        else:
            y = shards.scatter(F.linear(*given), shift)
        (y * along).sum().backward()
        results.append([y.detach(), given[0].grad, given[1].grad, shift.grad])
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            assert_close(found, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_scattered_product_is_a_product_that_is_scattered(
    distributed: Distributed, frozen: bool
) -> None:
    distributed(2, check_scattered_product, frozen)


def test_products_that_keep_rows_are_those_of_gathered_tokens(distributed: Distributed) -> None:
    distributed(2, check_products)


class Calls(TorchDispatchMode):
    """In the place of a network that has one rank: what is begun, computed and waited for, in
    order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        monkeypatch.setattr(sequence, "all_gather_single", self._gather)
        monkeypatch.setattr(sequence, "reduce_scatter_single", self._scatter)

    def _gather(self, everything: Tensor, own: Tensor, group: Any, async_op: bool) -> Work | None:
        everything.copy_(own)
        return self._begin("gathering", async_op)

    def _scatter(self, own: Tensor, rows: Tensor, group: Any, async_op: bool) -> Work | None:
        own.copy_(rows)
        return self._begin("scattering", async_op)

    def _begin(self, what: str, async_op: bool) -> Work | None:
        self.names.append(f"{what} begins")
        if async_op:
            return Work(self, what)
        self.names.append(f"{what} ends")
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__.partition(".")[0] in ("mm", "addmm", "bmm"):
            self.names.append("product")
        return func(*args, **(kwargs or {}))


class Work:
    """Of a message that is under way until somebody waits for it."""

    def __init__(self, calls: Calls, what: str) -> None:
        self._calls, self._what = calls, what

    def wait(self) -> None:
        self._calls.names.append(f"{self._what} ends")


def test_messages_are_under_way_while_products_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Backward, the tokens are on their way during the gradients by them, and these during the
    gradients of the weights.
    """
    shards = SequenceShards(ProcessGrid(), 3, 3)
    x = random(9, WIDTH).requires_grad_()
    first, second = (random(5, WIDTH, seed=seed).requires_grad_() for seed in (1, 2))
    with Calls(monkeypatch) as calls:
        y, z = gathered_products(x, [(first, None), (second, None)], shards)
        assert calls.names == ["gathering begins", "gathering ends", "product", "product"]
        calls.names.clear()
        (y + z).sum().backward()
    assert calls.names == [
        "gathering begins",
        "product",
        "product",
        "gathering ends",
        "scattering begins",
        "product",
        "product",
        "scattering ends",
    ]
    assert second.grad is not None
    assert_close(second.grad, x.detach().sum(0).expand(5, WIDTH))
