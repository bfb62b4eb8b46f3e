"""The computed permutation is a bijection, looks random, and needs no memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaegpt.data.tokens.permutation import EpochOrder, Permutation


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 100))
def test_it_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = Permutation(size, (seed, epoch))(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [10**12, 2**62, 10**12 + 39])
def test_huge_sizes_cost_no_memory_and_stay_inside(size: int) -> None:
    tracemalloc.start()
    order = Permutation(size, (1, 2))
    indices = np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000)])
    images = order(indices)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(images)) == len(indices)
    assert images.min() >= 0
    assert images.max() < size
    assert peak < 20e6
    # The mean of uniform draws: 6 standard errors of 1/sqrt(12 n).
    assert abs(images.astype(float).mean() / size - 0.5) < 6 / np.sqrt(12 * len(indices))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_of_few_items_is_equally_likely(size: int) -> None:
    draws = 6000
    counts = Counter(
        tuple(Permutation(size, (7, key))(np.arange(size)).tolist()) for key in range(draws)
    )
    orders = int(np.prod(np.arange(1, size + 1)))
    expected = draws / orders
    assert len(counts) == orders
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < orders - 1 + 5 * np.sqrt(2 * orders)


def test_neighbours_do_not_stay_together() -> None:
    images = Permutation(10_000, (3, 1))(np.arange(10_000))
    correlation = np.corrcoef(images[:-1], images[1:])[0, 1]
    assert abs(correlation) < 0.05
    assert (np.abs(np.diff(images)) == 1).sum() < 20


def test_keys_give_different_orders_and_the_same_key_the_same() -> None:
    indices = np.arange(1000)
    first = Permutation(1000, (1, 0))(indices)
    assert np.array_equal(first, Permutation(1000, (1, 0))(indices))
    assert (first == Permutation(1000, (1, 1))(indices)).mean() < 0.02
    assert (first == Permutation(1000, (2, 0))(indices)).mean() < 0.02


def test_known_images_never_change() -> None:
    """Another order for the same seed would break the resumption of every run."""
    assert Permutation(10, (1337, 0))(np.arange(10)).tolist() == [7, 1, 8, 0, 3, 2, 6, 9, 4, 5]
    assert Permutation(10**12, (1337, 3))(np.arange(3)).tolist() == [
        26826805651,
        845550926650,
        184312384421,
    ]


def test_sizes_without_items_are_refused() -> None:
    with pytest.raises(ValueError, match="permutation of 0 items"):
        Permutation(0, (1,))


@pytest.mark.parametrize("size", [1, 7, 4096, 5000, 9000])
def test_an_epoch_has_every_item_once_in_an_order_of_its_own(size: int) -> None:
    order = EpochOrder(size, seed=5)
    epochs = order(np.arange(3 * size)).reshape(3, size)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 1:
        assert not np.array_equal(epochs[0], epochs[1])


def test_items_do_not_depend_on_what_was_asked_before() -> None:
    order, fresh = EpochOrder(5000, seed=5), EpochOrder(5000, seed=5)
    in_order = order(np.arange(12_000))
    for number in (11_999, 3, 4999, 5000, 4095, 4096):
        assert fresh(np.array([number]))[0] == in_order[number]
