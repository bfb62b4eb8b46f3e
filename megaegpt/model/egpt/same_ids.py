"""Which keys have the ids that queries ask for: the tokens that are the same at both places, and
those behind which a given token came.

Of the thousands of keys that a query is compared with, a few tens have its id. A GPU compares all
of them, in masks as large as the scores: how many places a list of them has is known to its host
only when it has waited for it. On a CPU, where every pass over the scores counts, the keys' ids are
sorted once a chunk, and the queries' looked up among them; where they come again so often (padding,
tables, blanks) that a list of places would take longer, they are compared there too.

Shapes: B batch, R queries, K keys that they may see, H pointers, G 1 or H, n places found.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

AS_PLACES = {"cpu"}
"""Types of devices on which places are listed; on others all ids are compared."""

MOST_LISTED = 1 / 20
"""Of all pairs of queries and keys; where more have the same id, masks are faster. (Of 1,024
queries and 16,384 keys, forward and backward on one CPU core: lists take 0.4 s where 1 pair in
5,000 has it, 0.8 s at 1 in 20, 2.4 s at 1 in 4; masks 0.8 s.)"""

FEWEST_LOOKED_UP = 1 << 15
"""With fewer keys than these the ids of one query are compared sooner than looked up."""

Shape = tuple[int, int, int, int]
"""(B, H, R, K)"""


class SortedIds(NamedTuple):
    """The ids of a row's keys, among which queries' are looked up."""

    ids: Tensor
    """(K,) ascending"""
    order: Tensor
    """(K,) int32: of which key each is"""

    @staticmethod
    def of(ids: Tensor) -> tuple[SortedIds, ...]:
        """Of each row of ids (B, K) in any order."""
        return tuple(SortedIds(row, order.int()) for row, order in map(Tensor.sort, ids))

    def find(self, wanted: Tensor) -> Spans:
        """Where ids (R,) are."""
        first = torch.searchsorted(self.ids, wanted)
        return Spans(first, torch.searchsorted(self.ids, wanted, right=True) - first, self.order)


class Spans(NamedTuple):
    """Where the ids of queries are among sorted ones."""

    first: Tensor
    """(R,): the place of the first that is the same"""
    counts: Tensor
    """(R,): how many are"""
    order: Tensor
    """(K,): of which key each is"""

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The query and the key (n,) of every pair that has the same."""
        if len(self.counts) == 1:
            first, count = int(self.first), int(self.counts)
            return self.first.new_zeros(count), self.order[first : first + count]
        queries = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        # from a place in the list to one in the order
        shift = self.first - (self.counts.cumsum(0) - self.counts)
        return queries, self.order[torch.arange(len(queries)) + shift[queries]]


class SortedKeys(NamedTuple):
    """Keys whose ids are sorted."""

    rows: tuple[SortedIds, ...]
    """Of each row"""
    first: int
    """The place in them of the first key's id"""
    num_keys: int
    """Behind them may be more ids. Keys behind these are compared."""


@dataclass(frozen=True)
class KeyIds:
    """The ids at keys."""

    ids: Tensor
    """(B, G, K)"""
    sorted: SortedKeys | None = None
    """The first of them, where G is 1; None: all are compared."""

    def having(self, wanted: Tensor, shape: Shape) -> Found:
        """Which of them are the id that each query wants, (B, H or 1, R); among scores of
        ``shape``.
        """
        if not lists_places(self.ids):
            return FoundMask(equal_ids(wanted, self.ids))
        if self.sorted is None:
            mask = equal_ids(wanted, self.ids)
            if int(mask.count_nonzero()) > MOST_LISTED * mask.numel():
                return FoundMask(mask)
            return FoundPlaces(mask.expand(shape).flatten().nonzero().squeeze(1), shape)
        spans = [
            [keys.find(ids) for ids in row]
            for keys, row in zip(self.sorted.rows, wanted, strict=True)
        ]
        pairs = sum(int(found.counts.sum()) for row in spans for found in row)
        if pairs > MOST_LISTED * wanted.numel() * shape[3]:
            return FoundMask(equal_ids(wanted, self.ids))
        listed = _flat(spans, self.sorted, shape)
        if self.sorted.num_keys < shape[3]:
            listed = torch.cat([listed, self._compared(wanted, shape, self.sorted.num_keys)])
        return FoundPlaces(listed, shape)

    def _compared(self, wanted: Tensor, shape: Shape, first: int) -> Tensor:
        """The places (n,) in flattened scores of a shape of what is found from a key on."""
        mask = equal_ids(wanted, self.ids[..., first:]).expand(*shape[:3], -1)
        row, key = mask.flatten(0, 2).nonzero().unbind(1)
        return row * shape[3] + first + key


def _flat(spans: list[list[Spans]], keys: SortedKeys, shape: Shape) -> Tensor:
    """The places (n,) in flattened scores of a shape of what is found for each row and pointer, or
    for all pointers of a row.
    """
    _, pointers, queries, width = shape
    flat = []
    for row, by_pointer in enumerate(spans):
        pairs = [found.pairs() for found in by_pointer]
        for pointer in range(pointers):
            query, place = pairs[pointer if len(pairs) > 1 else 0]
            key = place - keys.first
            places = ((row * pointers + pointer) * queries + query) * width + key
            flat.append(places[(key >= 0) & (key < min(keys.num_keys, width))])
    return torch.cat(flat)


def lists_places(ids: Tensor) -> bool:
    """Whether places are listed for ids. A plan's tensors, of a type of their own, have no values,
    and so no places.
    """
    return ids.device.type in AS_PLACES and type(ids) is Tensor


def equal_ids(wanted: Tensor, ids: Tensor) -> Tensor:
    """(B, G, R), (B, G, K) -> (B, G, R, K)"""
    return wanted.unsqueeze(3).int() == ids.int().unsqueeze(2)  # twice as many at a time


@dataclass(frozen=True)
class Visible:
    """Which keys queries see."""

    known: Tensor
    """(B, G, K): whether the token behind a key is known"""
    own: int
    """From this key on they are of the queries' own chunk."""
    offsets: Tensor | None
    """(R,): of those a query sees so many; None: all"""
    chosen: Tensor | None = None
    """(B, H, R, K); None: all are chosen"""

    def _before(self) -> Tensor | None:
        """(R, keys of the own chunk)"""
        if self.offsets is None:
            return None
        places = torch.arange(self.known.shape[2] - self.own, device=self.known.device)
        return places < self.offsets.unsqueeze(1)

    def mask(self) -> Tensor:
        """(B, H or 1, R, K) or what broadcasts to it."""
        mask = self.known.unsqueeze(2)
        if (before := self._before()) is not None:
            mask = mask.repeat(1, 1, len(before), 1)
            mask[..., self.own :] &= before
        return mask if self.chosen is None else mask & self.chosen

    def add_(self, scores: Tensor, bias: Tensor) -> None:
        """Add a bias (B or 1, H, K) to scores (B, H, R, K) in place; -inf where nothing is seen."""
        bias = bias.to(scores.dtype).masked_fill(~self.known, -torch.inf)
        scores += bias.unsqueeze(2)
        if (before := self._before()) is not None:
            scores[..., self.own :].masked_fill_(~before, -torch.inf)
        if self.chosen is not None:
            scores.masked_fill_(~self.chosen, -torch.inf)

    def at(self, row: Tensor, pointer: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries see keys, (n,) each."""
        seen = self.known[row, pointer if self.known.shape[1] > 1 else 0, key]
        if self.offsets is not None:
            seen &= key - self.own < self.offsets[query]
        return seen if self.chosen is None else seen & self.chosen[row, pointer, query, key]


class Found(abc.ABC):
    """Keys that have the queries' ids."""

    @abc.abstractmethod
    def sums(self, values: Tensor) -> Tensor:
        """Add up values (B, H, R, K) over them -> (B, H, R)."""

    @abc.abstractmethod
    def multiply_(self, values: Tensor, these: Tensor, others: Tensor) -> Tensor:
        """Multiply values (B, H, R, K) in place, at them and elsewhere, by (B, H, R) each."""

    @abc.abstractmethod
    def seen(self, visible: Visible, before: Tensor, wanted: Tensor) -> SameTokens:
        """Those that are visible, and which of them have, one place before, the ids (B, G, K) that
        are wanted (B, R) there.
        """


class SameTokens(abc.ABC):
    """Keys whose token is the query's, some of which have the same one before it too."""

    @abc.abstractmethod
    def add_(self, scores: Tensor, bonus: Tensor) -> None:
        """Add a bonus (H, 2) for one and for two tokens to scores (B, H, R, K) in place."""

    @abc.abstractmethod
    def by_bonus(self, by_scores: Tensor) -> Tensor:
        """The bonus' gradient (H, 2) of the scores' (B, H, R, K)."""

    @abc.abstractmethod
    def longest(self) -> Tensor:
        """At how many tokens, 0 to 2, a key is the same at most, (B, H or 1, R)."""


@dataclass(frozen=True)
class FoundMask(Found):
    """As a mask (B, H or 1, R, K)."""

    mask: Tensor

    def sums(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0.0).sum(-1)

    def multiply_(self, values: Tensor, these: Tensor, others: Tensor) -> Tensor:
        return values.mul_(torch.where(self.mask, these.unsqueeze(-1), others.unsqueeze(-1)))

    def seen(self, visible: Visible, before: Tensor, wanted: Tensor) -> SameTokens:
        same = self.mask & visible.mask()
        return SameTokensMask(same, equal_ids(wanted.unsqueeze(1), before) & same)


@dataclass(frozen=True)
class SameTokensMask(SameTokens):
    """As masks (B, H or 1, R, K) of all and of those with two tokens."""

    same: Tensor
    twice: Tensor

    def add_(self, scores: Tensor, bonus: Tensor) -> None:
        one, two = bonus.to(scores.dtype)[..., None, None].unbind(1)
        scores += torch.where(self.twice, two, torch.where(self.same, one, 0.0))

    def by_bonus(self, by_scores: Tensor) -> Tensor:
        one, two = (
            torch.where(same, by_scores, 0.0).sum((0, 2, 3)) for same in (self.same, self.twice)
        )
        return torch.stack([one - two, two], dim=1)

    def longest(self) -> Tensor:
        one, two = (same.view(torch.uint8).amax(-1).long() for same in (self.same, self.twice))
        return one + two


@dataclass(frozen=True)
class FoundPlaces(Found):
    """As places (n,) in flattened scores of a shape."""

    flat: Tensor
    shape: Shape

    def sums(self, values: Tensor) -> Tensor:
        total = values.new_zeros(values.shape[:3])
        by_place = values.view(-1)[self.flat]
        total.view(-1).index_add_(0, self.flat // self.shape[3], by_place)
        return total

    def multiply_(self, values: Tensor, these: Tensor, others: Tensor) -> Tensor:
        by_place = values.view(-1)[self.flat] * these.flatten()[self.flat // self.shape[3]]
        values.mul_(others.unsqueeze(-1))
        values.view(-1)[self.flat] = by_place
        return values

    def seen(self, visible: Visible, before: Tensor, wanted: Tensor) -> SameTokens:
        _, pointers, queries, keys = self.shape
        rest, key = self.flat // keys, self.flat % keys
        row, pointer, query = (
            rest // queries // pointers,
            rest // queries % pointers,
            rest % queries,
        )
        seen = visible.at(row, pointer, query, key)
        of_pointer = pointer if before.shape[1] > 1 else 0
        twice = before[row, of_pointer, key] == wanted[row, query]
        return SameTokensPlaces(self.flat[seen], twice[seen].long(), pointer[seen], self.shape)


@dataclass(frozen=True)
class SameTokensPlaces(SameTokens):
    """As places (n,) in flattened scores of a shape."""

    flat: Tensor
    twice: Tensor
    """(n,) 1 where two tokens are the same, else 0"""
    pointer: Tensor
    """(n,)"""
    shape: Shape

    def add_(self, scores: Tensor, bonus: Tensor) -> None:
        scores.view(-1)[self.flat] += bonus.to(scores.dtype)[self.pointer, self.twice]

    def by_bonus(self, by_scores: Tensor) -> Tensor:
        total = by_scores.new_zeros(self.shape[1], 2)
        by_place = by_scores.view(-1)[self.flat]
        total.view(-1).index_add_(0, 2 * self.pointer + self.twice, by_place)
        return total

    def longest(self) -> Tensor:
        most = self.flat.new_zeros(self.shape[:3])
        query = self.flat // self.shape[3]
        most.view(-1).scatter_reduce_(0, query, 1 + self.twice, "amax")
        return most
