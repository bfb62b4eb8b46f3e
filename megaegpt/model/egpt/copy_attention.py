"""Attention that points at earlier tokens and says which token followed them.

A pointer gives each earlier token j a weight a_j, the softmax of scores, and so predicts a token y
with the probability of all tokens that y followed:

    p(y) = sum_j a_j [x_j+1 = y]

as continuous caches do (Grave et al., arXiv 1612.04426) and, over a data store, kNN-LMs (Khandelwal
et al., arXiv 1911.00172). A token t sees those of earlier chunks and, of its own chunk, the tokens
j < t: what followed them has been read. A score is higher where the last tokens are the same at
both places, as in cache models of n-grams (Kuhn and De Mori 1990) and induction heads (Olsson et
al., arXiv 2209.11895).

In training only the probability of each target is needed. It is computed for some rows at a time
and once more in the backward pass, so that nothing of (tokens x keys), and nothing at all of
(tokens x vocabulary), is kept.

Shapes: B batch, T queries, R rows of them, S chunk size, J keys of earlier chunks, K keys that rows
may see, H pointers, D key width, L distances that are told apart, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Scores that exist at once, by device type."""

_UNKNOWN = -1
"""In the place of an id."""


class Keys(NamedTuple):
    """Consecutive tokens that pointers choose among."""

    keys: Tensor
    """(B, H, J, D); int8: in units of 1 / 127, without a gradient"""
    text: Tensor
    """(B, J + 2) ids: the token before the first, those of the keys, and the one behind the last.
    Negative: it is not known; it is the same as no other, and the key that it is behind not seen.
    """

    @property
    def num_keys(self) -> int:
        """J"""
        return self.keys.shape[2]

    def cut(self, start: int, stop: int) -> Keys:
        """The keys from ``start`` on, before ``stop``."""
        return Keys(self.keys[:, :, start:stop], self.text[:, start : stop + 2])

    def row(self, number: int) -> Keys:
        """Those of one row, B = 1."""
        return Keys(self.keys[number : number + 1], self.text[number : number + 1])


class Scoring(NamedTuple):
    """What scores are made of beside products of queries and keys."""

    distance_bias: Tensor
    """(H, L): added to the scores of the query's own chunk, of the one before, ...; the last is
    also that of all chunks before."""
    match_bonus: Tensor
    """(H, 2): added where the token is the query's, and where the one before is the same too."""
    chunk_size: int
    most_chunks: int | None = None
    """Earlier chunks that a query sees, those whose mean key its scores are highest for; None:
    all."""


class Pointers(NamedTuple):
    """What the pointers say of each query's target, and how sure they are."""

    probability: Tensor
    """(B, H, T) of the target; 0 where nothing is seen."""
    largest: Tensor
    """(B, H, T): the largest score, without a gradient; -inf where nothing is seen."""
    peak: Tensor
    """(B, H, T): log of its weight, without a gradient; 0 where nothing is seen."""
    agreement: Tensor
    """(B, H, T): log of the weight of all keys with its successor, without a gradient; 0 where
    nothing is seen."""
    longest: Tensor
    """(B, H, T): at how many tokens, up to 2, a key that is seen is the same at most."""


class _Block(NamedTuple):
    """Queries of one chunk that are computed together, and what they may see."""

    rows: slice
    offsets: Tensor
    """(R,): places of the queries in their chunk."""
    start: int
    """The query that is the first of their chunk."""
    earlier: Keys
    """Of all chunks before theirs."""
    own: Keys
    """Of their chunk, from its first token to at least the last of them."""
    from_chunk: Tensor | None
    """(B, 1): the first chunk that is seen; None: all are."""


class _Scan(NamedTuple):
    """What :func:`point` is called with beside queries."""

    earlier: Keys
    own: Keys
    scoring: Scoring
    targets: Tensor
    first_chunk: int
    from_chunk: Tensor | None

    def of(self, earlier: Tensor, own: Tensor, distance_bias: Tensor, match_bonus: Tensor) -> _Scan:
        """The same with other keys and numbers."""
        scoring = self.scoring._replace(distance_bias=distance_bias, match_bonus=match_bonus)
        return self._replace(
            earlier=self.earlier._replace(keys=earlier),
            own=self.own._replace(keys=own),
            scoring=scoring,
        )

    def blocks(self, queries: Tensor) -> Iterator[_Block]:
        """Cut queries (B, H, T, D) where chunks end, and into as many as are computed at once."""
        size, length = self.scoring.chunk_size, queries.shape[2]
        budget = SCORES_AT_ONCE.get(queries.device.type, 1 << 22)
        for start in range(0, length, size):
            chunk, end = self.first_chunk + start // size, min(start + size, length)
            earlier = self.earlier.cut(0, chunk * size)
            columns = queries.shape[0] * queries.shape[1] * (earlier.num_keys + end - start)
            rows = max(budget // columns, 1)
            begin = None if self.from_chunk is None else self.from_chunk[:, chunk : chunk + 1]
            for row in range(start, end, rows):
                stop = min(row + rows, end)
                offsets = torch.arange(row - start, stop - start, device=queries.device)
                own = self.own.cut(start, stop)
                yield _Block(slice(row, stop), offsets, start, earlier, own, begin)


class _Scores(NamedTuple):
    """Of keys of earlier chunks, then those of the own one."""

    scores: Tensor
    """(B, H, R, K) in at least fp32; -inf at what is not seen."""
    same: Tensor
    """(B, H or 1, R, K): what is seen and has the query's token."""
    same_before: Tensor
    """The same, and the token before is the same too."""
    successors: Tensor
    """(B, K)"""


def _scores(queries: Tensor, block: _Block, scoring: Scoring) -> _Scores:
    """Scores of a block's queries (B, H, R, D)."""
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    keys = (block.earlier.keys, block.own.keys)
    scores = torch.cat([_products(queries, part) for part in keys], -1)
    scores += _bias_by_key(block, scoring).to(scores.dtype)[None, :, None]
    begin = None if block.from_chunk is None else block.from_chunk * scoring.chunk_size
    visible = _visible(block, begin)
    most = scoring.most_chunks
    if most is not None and most * scoring.chunk_size < block.earlier.num_keys:
        visible = visible & _chosen(queries, block, most, scoring.chunk_size)
    scores.masked_fill_(~visible, -torch.inf)
    same, same_before = _matches(block, begin)
    same = same & visible
    same_before = same_before & same
    once, twice = scoring.match_bonus.to(scores.dtype)[..., None, None].unbind(1)
    scores += torch.where(same_before, twice, torch.where(same, once, 0.0))
    return _Scores(scores, same, same_before, _successors(block))


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """(B, H, R, D), keys (B, H, J, D) -> (B, H, R, J)"""
    if keys.dtype == torch.int8:
        queries = queries / 127
    return queries @ keys.to(queries.dtype).transpose(-1, -2)


def _bias_by_key(block: _Block, scoring: Scoring) -> Tensor:
    """(H, K)"""
    far = scoring.distance_bias[:, _distances(block, scoring)]  # (H, chunks)
    own = scoring.distance_bias[:, :1].expand(-1, block.own.num_keys)
    return torch.cat([far.repeat_interleave(scoring.chunk_size, dim=1), own], dim=1)


def _distances(block: _Block, scoring: Scoring) -> Tensor:
    """The column of ``distance_bias`` for each earlier chunk of keys."""
    chunks = block.earlier.num_keys // scoring.chunk_size
    distances = torch.arange(chunks, 0, -1, device=block.offsets.device)
    return distances.clamp(max=scoring.distance_bias.shape[1] - 1)


def _successors(block: _Block) -> Tensor:
    return torch.cat([block.earlier.text[:, 2:], block.own.text[:, 2:]], dim=1)


def _places(block: _Block) -> tuple[Tensor, Tensor]:
    """Of queries (R,) and keys (K,), counted from the first key's."""
    count = block.earlier.num_keys
    keys = torch.arange(count + block.own.num_keys, device=block.offsets.device)
    return count + block.offsets, keys


def _visible(block: _Block, begin: Tensor | None) -> Tensor:
    """Which keys are of tokens whose successors are known, and have been read: (B, 1, R, K).

    Args:
        begin: (B, 1) place of the first token that is seen; None: all are.
    """
    places, keys = _places(block)
    known = _successors(block) >= 0  # (B, K)
    if begin is not None:
        known = known & (keys >= begin)
    return known[:, None, None] & (keys < places.unsqueeze(1))


def _chosen(queries: Tensor, block: _Block, most: int, size: int) -> Tensor:
    """Which keys are of the earlier chunks that each query sees, or of its own: (B, H, R, K)."""
    means = block.earlier.keys.to(queries.dtype).unflatten(2, (-1, size)).mean(3)
    similar = queries @ means.transpose(-1, -2)  # (B, H, R, chunks)
    if block.from_chunk is not None:
        hidden = torch.arange(means.shape[2], device=means.device) < block.from_chunk
        similar = similar.masked_fill(hidden[:, None, None], -torch.inf)
    best = similar.topk(most, dim=-1).indices
    chosen = torch.zeros_like(similar, dtype=torch.bool).scatter_(-1, best, True)
    chosen = chosen.repeat_interleave(size, dim=-1)
    return torch.cat([chosen, chosen.new_ones(*chosen.shape[:3], block.own.num_keys)], dim=-1)


def _matches(block: _Block, begin: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where keys' tokens are the queries', and where those before them are: (B, 1, R, K) each.

    ``begin``: see :func:`_visible`; what is before it is not known.
    """
    tokens, before = (
        torch.cat([block.earlier.text[:, a:b], block.own.text[:, a:b]], dim=1)
        for a, b in ((1, -1), (0, -2))
    )  # (B, K)
    wanted = block.own.text[:, 1 + block.offsets]  # (B, R)
    wanted_before = block.own.text[:, block.offsets]
    if begin is not None:
        places, keys = _places(block)
        before = before.masked_fill(keys == begin, _UNKNOWN)
        wanted_before = wanted_before.masked_fill(places == begin, _UNKNOWN)
    # What is not known of a query is unlike what is not known of a key.
    wanted_before = wanted_before.masked_fill(wanted_before < 0, _UNKNOWN - 1)
    return _equal(wanted, tokens), _equal(wanted_before, before)


def _equal(queries: Tensor, keys: Tensor) -> Tensor:
    """Ids (B, R) and (B, K) -> (B, 1, R, K)"""
    return queries[:, None, :, None] == keys[:, None, None]


def _weights(scores: Tensor, log_sum: Tensor) -> Tensor:
    """exp(scores - log_sum) in place; 0 in rows that see nothing."""
    nothing = log_sum == -torch.inf
    return scores.sub_(log_sum.masked_fill(nothing, 0.0).unsqueeze(-1)).exp_()


def _weigh(found: _Scores) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Weights, in place of the scores, their log_sum (B, H, R), and what is known of how sure they
    are: all of :class:`Pointers` but the probability.
    """
    scores = found.scores
    log_sum = scores.logsumexp(-1)
    largest, nearest = scores.max(-1)  # (B, H, R)
    nothing = largest == -torch.inf
    weights = _weights(scores, log_sum)
    known = found.successors  # (B, K)
    likeliest = known.gather(1, nearest.flatten(1)).view_as(nearest)
    agrees = known[:, None, None] == likeliest.unsqueeze(-1)
    agreement = (weights * agrees).sum(-1).log().masked_fill(nothing, 0.0)
    peak = (largest - log_sum).masked_fill(nothing, 0.0)
    longest = _any(found.same) + _any(found.same_before)
    return weights, log_sum, (largest, peak, agreement, longest.expand_as(largest))


def _any(mask: Tensor) -> Tensor:
    """``mask.any(-1)`` as 0 or 1; torch's own takes many times as long on a CPU."""
    return mask.view(torch.uint8).amax(-1).long()


class _CopyAttention(torch.autograd.Function):
    """The probability is differentiable by the first five arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        earlier_keys: Tensor,
        own_keys: Tensor,
        distance_bias: Tensor,
        match_bonus: Tensor,
        scan: _Scan,
    ) -> tuple[Tensor, ...]:
        scan = scan.of(earlier_keys, own_keys, distance_bias, match_bonus)
        precise = torch.promote_types(queries.dtype, torch.float32)
        empty = queries.new_empty(queries.shape[:3], dtype=precise)
        probability, log_sum, largest, peak, agreement = (torch.empty_like(empty) for _ in range(5))
        longest = torch.empty_like(empty, dtype=torch.long)
        for block in scan.blocks(queries):
            part = (..., block.rows)
            found = _scores(queries[:, :, block.rows], block, scan.scoring)
            weights, log_sum[part], sureness = _weigh(found)
            largest[part], peak[part], agreement[part], longest[part] = sureness
            probability[part] = weights.mul_(_hits(found, scan.targets, block)).sum(-1)
        ctx.save_for_backward(
            queries, earlier_keys, own_keys, distance_bias, match_bonus, probability, log_sum
        )
        ctx.scan = scan
        ctx.mark_non_differentiable(largest, peak, agreement, longest)
        return probability, largest, peak, agreement, longest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_probability = grads[0]
        queries, *parameters, probability, log_sum = ctx.saved_tensors
        scan: _Scan = ctx.scan.of(*parameters)
        by_queries, *by_parameters = (
            torch.zeros_like(x, dtype=log_sum.dtype) for x in (queries, *parameters)
        )
        for block in scan.blocks(queries):
            part = (..., block.rows)
            rows = queries[:, :, block.rows]
            found = _scores(rows, block, scan.scoring)
            weights = _weights(found.scores, log_sum[part])
            factor = _hits(found, scan.targets, block).to(weights.dtype)
            factor = factor.sub(probability[part].unsqueeze(-1))
            factor *= by_probability[part].unsqueeze(-1)
            found = found._replace(scores=weights.mul_(factor))  # now their gradients
            by_queries[:, :, block.rows] = _add_gradients(found, rows, block, scan, by_parameters)
        grads = tuple(
            by.to(x.dtype)
            for x, by in zip((queries, *parameters), (by_queries, *by_parameters), strict=True)
        )
        return *grads, None


def _add_gradients(
    found: _Scores, queries: Tensor, block: _Block, scan: _Scan, by_parameters: list[Tensor]
) -> Tensor:
    """Gradients of a block's scores become those of its queries, which are returned, and are added
    to those of keys of earlier chunks, the own ones, ``distance_bias`` and ``match_bonus``.
    """
    by_scores, count = found.scores, block.earlier.num_keys
    queries = queries.to(by_scores.dtype)
    by_earlier, by_own, by_bias, by_bonus = by_parameters
    by_queries = torch.zeros_like(queries)
    for by_keys, keys, start, part in (
        (by_earlier, block.earlier.keys, 0, by_scores[..., :count]),
        (by_own, block.own.keys, block.start, by_scores[..., count:]),
    ):
        by_queries += part @ keys.to(part.dtype)
        by_keys[:, :, start : start + keys.shape[2]] += part.transpose(-1, -2) @ queries
    by_key = by_scores.sum((0, 2))  # (H, K)
    by_chunk = by_key[:, :count].unflatten(1, (-1, scan.scoring.chunk_size)).sum(2)
    by_bias.index_add_(1, _distances(block, scan.scoring), by_chunk)
    by_bias[:, 0] += by_key[:, count:].sum(1)
    twice = (by_scores * found.same_before).sum((0, 2, 3))
    by_bonus[:, 0] += (by_scores * found.same).sum((0, 2, 3)) - twice
    by_bonus[:, 1] += twice
    return by_queries


def _hits(found: _Scores, targets: Tensor, block: _Block) -> Tensor:
    """Where keys are followed by the target: (B, 1, R, K)."""
    return _equal(targets[:, block.rows], found.successors)


def point(
    queries: Tensor,
    earlier: Keys,
    own: Keys,
    scoring: Scoring,
    targets: Tensor,
    first_chunk: int = 0,
    from_chunk: Tensor | None = None,
) -> Pointers:
    """Each query's pointers at earlier tokens, and what they say of its target.

    Args:
        queries: (B, H, T, D), scaled: their products with keys are the scores. The first is the
            first token of its chunk.
        earlier: keys of whole chunks: a query sees those of the chunks before its own.
        own: the keys of the same tokens as the queries: one sees those of its chunk before it.
        targets: (B, T) ids; negative: none, which nothing predicts.
        first_chunk: number of the first query's chunk, counted from that of the first key.
        from_chunk: (B, chunks) for each chunk's queries the first chunk that they see, all counted
            as ``first_chunk`` is; None: they see all.
    """
    scan = _Scan(earlier, own, scoring, targets, first_chunk, from_chunk)
    parameters = (earlier.keys, own.keys, scoring.distance_bias, scoring.match_bonus)
    return Pointers(*_CopyAttention.apply(queries, *parameters, scan))


def pointed_at(
    queries: Tensor, offsets: Tensor, earlier: Keys, own: Keys, scoring: Scoring
) -> tuple[Tensor, Tensor, Pointers]:
    """Weights (B, H, T, K) of all keys for queries of one chunk, the tokens behind the keys (B, K),
    and the pointers, without any target. No gradient.

    Args:
        queries: (B, H, T, D), scaled.
        offsets: (T,) their places in their chunk.
        earlier: keys of all chunks before it.
        own: keys of the chunk from its first token to at least the last of ``offsets``.
    """
    found = _scores(queries, _Block(slice(None), offsets, 0, earlier, own, None), scoring)
    weights, _, sureness = _weigh(found)
    nothing = torch.zeros_like(sureness[0])
    return weights, found.successors, Pointers(nothing, *sureness)
