"""Several corpora in fixed proportions, without a stored schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from megaegpt.data.tokens.batch import Arrays
from megaegpt.data.tokens.permutation import Permutation
from megaegpt.data.tokens.samples import StreamSamples
from megaegpt.errors import DataError

_SMALLEST_BLOCK = 1024
_COUNTED_AT_ONCE = 1 << 16
_SMALLEST_SHARE = 1e-9
"""A source of less would not give a sample in any run, and blocks grow with its inverse."""


class Blend:
    """Samples of several sources, mixed by weight; itself a source of samples for the loader.

    Global sample numbers are cut into blocks. At every block's end, each source has given its
    weight's share of all samples so far, to within one sample; inside a block the order is
    pseudo-random. Which source a number belongs to, and its number inside that source, follow from
    the number alone.

    Args:
        sources: samples of one kind and size, out of several spans of one stream.
        weights: positive, in any unit; none less than a billionth of them all.
        seed: of the order inside blocks.
        names: of the sources, for reports; numbers without them.

    Raises:
        DataError: there is not one positive weight for each source.
    """

    def __init__(
        self,
        sources: Sequence[StreamSamples],
        weights: Sequence[float],
        seed: int,
        names: Sequence[str] = (),
    ) -> None:
        are_positive = all(weight > 0 for weight in weights) and math.isfinite(sum(weights))
        if not sources or len(sources) != len(weights) or not are_positive:
            raise DataError(f"{len(sources)} sources need as many positive weights, not {weights}")
        if any(source.stream is not sources[0].stream for source in sources):
            raise ValueError("the sources of a blend must be spans of one stream")
        if len({source.sample_len for source in sources}) > 1:
            raise ValueError("the sources of a blend must have samples of one length")
        self.sources = list(sources)
        self.names = list(names) or [str(number) for number in range(len(sources))]
        total = sum(weights)
        self.weights = [weight / total for weight in weights]
        if min(self.weights) < _SMALLEST_SHARE:
            name = self.names[self.weights.index(min(self.weights))]
            raise DataError(
                f"the weight of {name} is {min(self.weights):.1g} of all, which gives no sample: "
                "leave it out, or give it a billionth or more"
            )
        # Shares in exact integer arithmetic: rounding must not depend on machine or sample number.
        self._scale = 1 << 60
        cumulative = accumulate(self.weights)
        self._bounds = [0, *(round(bound * self._scale) for bound in cumulative)]
        self._bounds[-1] = self._scale
        # Two samples or more of every source a block: then no source's count can go backwards.
        self.block_size = max(_SMALLEST_BLOCK, int(2 / min(self.weights)) + 1)
        self._seed = seed
        self._cached: tuple[int, Permutation, list[int], list[int]] | None = None
        # Up to which sample a block's were counted, and how many are of each source: a run asks
        # again and again, and a small weight's block is millions of samples.
        self._counted = 0, np.zeros(len(self.sources), np.int64)

    def __len__(self) -> int:
        """Samples in which the source that runs out first is seen once."""
        return min(
            int(len(source) / weight)
            for source, weight in zip(self.sources, self.weights, strict=True)
        )

    def counts(self, block: int) -> list[int]:
        """Samples each source has given before a block."""
        before = block * self.block_size
        half = self._scale // 2
        bounds = [(bound * before + half) // self._scale for bound in self._bounds]
        return [high - low for low, high in pairwise(bounds)]

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source (n,) of each global sample number (n,), and the sample's number in its source."""
        sources = np.empty(len(numbers), np.int64)
        inside = np.empty(len(numbers), np.int64)
        blocks = numbers // self.block_size
        for block in np.unique(blocks).tolist():
            mask = blocks == block
            order, before, bounds = self._block(block)
            slots = order(numbers[mask] - block * self.block_size)
            found = np.searchsorted(bounds, slots, side="right")
            first = np.array([0, *bounds])[found]
            sources[mask] = found
            inside[mask] = np.array(before)[found] + slots - first
        return sources, inside

    def _block(self, block: int) -> tuple[Permutation, list[int], list[int]]:
        """A block's order, samples before it by source, and where in the order each source ends."""
        if self._cached is None or self._cached[0] != block:
            before, after = self.counts(block), self.counts(block + 1)
            ends = list(accumulate(b - a for a, b in zip(before, after, strict=True)))
            order = Permutation(self.block_size, (self._seed, block, 2))
            self._cached = (block, order, before, ends)
        return self._cached[1:]

    def batch(self, numbers: np.ndarray) -> Arrays:
        """Samples by global number (n,), in the form of the sources' own ``batch``."""
        sources, inside = self.locate(numbers)
        starts = np.empty(len(numbers), np.int64)
        for source in np.unique(sources).tolist():
            mask = sources == source
            starts[mask] = self.sources[source].starts(inside[mask])
        return self.sources[0].read(starts)

    def tokens_by_source(self, samples: int) -> list[int]:
        """Tokens predicted from each source in the first ``samples`` samples of a run."""
        block = samples // self.block_size
        counted, within = self._counted
        if counted // self.block_size != block or counted > samples:
            counted, within = block * self.block_size, np.zeros(len(self.sources), np.int64)
        for start in range(counted, samples, _COUNTED_AT_ONCE):
            numbers = np.arange(start, min(start + _COUNTED_AT_ONCE, samples))
            within = within + np.bincount(self.locate(numbers)[0], minlength=len(self.sources))
        self._counted = samples, within
        counts = np.array(self.counts(block)) + within
        return (counts * self.sources[0].sample_len).tolist()

    def _epochs(self, tokens: Sequence[float]) -> list[float]:
        return [
            seen / (self.sources[0].sample_len * len(source))
            for seen, source in zip(tokens, self.sources, strict=True)
        ]

    def progress(self, samples: int) -> dict[str, float]:
        """Tokens and epochs of each source after ``samples`` samples of a run, to be recorded."""
        tokens = self.tokens_by_source(samples)
        epochs = self._epochs(tokens)
        return {
            **{f"tokens/{name}": count for name, count in zip(self.names, tokens, strict=True)},
            **{f"epochs/{name}": seen for name, seen in zip(self.names, epochs, strict=True)},
        }

    def describe(self, samples: int) -> str:
        """One line on the shares and epochs of the corpora in a run of ``samples`` samples."""
        tokens = [weight * samples * self.sources[0].sample_len for weight in self.weights]
        parts = zip(self.names, self.weights, self._epochs(tokens), strict=True)
        return ", ".join(f"{w:.1%} {name} ({epochs:.2f} epochs)" for name, w, epochs in parts)
