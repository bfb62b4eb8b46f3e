"""A pseudo-random permutation of 0..n-1 that is computed, not stored.

A Feistel network over Z_a x Z_b with a * b >= n and a, b near sqrt(n): each round adds a keyed
hash of one half to the other, modulo its size, which can be undone and so is a bijection of the
a * b pairs (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, method 3). The few
results that are n or more are sent through again (cycle walking) until they fall inside, which
keeps it a bijection.
"""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 8
_BLOCK = 4096  # items computed at once where they are asked for in order


class Permutation:
    """The permutation of ``range(size)`` that belongs to ``key``.

    >>> order = Permutation(10, key=(1337, 0))
    >>> sorted(order(np.arange(10)).tolist()) == list(range(10))
    True

    Args:
        size: number of items, 1 to 2^62.
        key: non-negative integers, such as (seed, epoch); another key gives another permutation.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation of {size} items; 1 to 2^62 are possible")
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        words = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
        self._keys = [np.uint64(word) for word in words]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of ``indices`` (any shape, each in 0..size-1), as int64."""
        shape = np.shape(indices)
        values = self._once(np.ravel(indices).astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._once(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64).reshape(shape)

    def _once(self, values: np.ndarray) -> np.ndarray:
        """The Feistel network on 0..a*b-1."""
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = values // b, values % b
        for number, key in enumerate(self._keys):
            if number % 2:
                right = _add(right, _hash(left ^ key), b)
            else:
                left = _add(left, _hash(right ^ key), a)
        return left * b + right


def _hash(values: np.ndarray) -> np.ndarray:
    """32 well-mixed bits of each value (the finaliser of splitmix64), as uint64."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values >> np.uint64(32)


def _add(values: np.ndarray, random_bits: np.ndarray, size: np.uint64) -> np.ndarray:
    """(values + a number below size drawn by 32 random bits) mod size; size is below 2^32."""
    total = values + ((random_bits * size) >> np.uint64(32))
    return np.where(total >= size, total - size, total)


class EpochOrder:
    """Which item a global sample number stands for: every epoch is its own permutation.

    Sample ``number`` is item ``permutation(seed, number // size)[number % size]``. Items are
    computed a block ahead, so numbers asked for in order cost next to nothing each.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._seed = seed
        self._permutation = (-1, Permutation(1, (0,)))
        self._block = (-1, np.empty(0, np.int64))
        self._block_size = min(_BLOCK, size)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Items (n,) of global sample numbers (n,)."""
        blocks = numbers // self._block_size
        first = int(blocks[0]) if len(blocks) else 0
        if (blocks == first).all():
            return self._items_of_block(first)[numbers - first * self._block_size]
        items = np.empty(len(numbers), np.int64)
        for block in np.unique(blocks).tolist():
            mask = blocks == block
            items[mask] = self._items_of_block(block)[numbers[mask] - block * self._block_size]
        return items

    def _items_of_block(self, block: int) -> np.ndarray:
        if self._block[0] != block:
            numbers = np.arange(self._block_size, dtype=np.int64) + block * self._block_size
            epochs = numbers // self.size
            items = np.empty(self._block_size, np.int64)
            for epoch in np.unique(epochs).tolist():
                mask = epochs == epoch
                items[mask] = self._of_epoch(epoch)(numbers[mask] % self.size)
            self._block = (block, items)
        return self._block[1]

    def _of_epoch(self, epoch: int) -> Permutation:
        if self._permutation[0] != epoch:
            self._permutation = (epoch, Permutation(self.size, (self._seed, epoch)))
        return self._permutation[1]
