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

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaegpt.model.egpt.same_ids import (
    FEWEST_LOOKED_UP,
    Found,
    KeyIds,
    SameTokens,
    Shape,
    SortedIds,
    SortedKeys,
    Visible,
    lists_places,
)

SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Scores that exist at once, by device type."""

SPAN = 64
"""Scores of which the largest is found first."""

CONVERTED_AT_ONCE = 4096
"""Keys of a smaller type that a CPU converts before their products with few queries are computed:
so many stay in its cache, where all of a long text's would be written to memory and read again."""

_UNKNOWN = -1
"""In the place of an id."""


class Keys(NamedTuple):
    """Consecutive tokens that pointers choose among."""

    keys: Tensor
    """(B, H, J, D); int8: in units of 1 / 127, without a gradient"""
    text: Tensor
    """(B, J + 2) ids, int64 or int32: the token before the first, those of the keys, and the one
    behind the last. Negative: it is not known; it is the same as no other, and the key that it is
    behind not seen.
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
    """Earlier chunks that a query sees, those with the highest mean score; None: all."""
    at_once: int | None = None
    """Scores that are computed at once; None: as the device has it."""


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
    """Which of the own keys is the first of their chunk's."""
    earlier: Keys
    """Of all chunks before theirs."""
    own: Keys
    """Of their chunk, from its first token to at least the last of them."""
    from_chunk: Tensor | None
    """(B, 1): the first chunk that is seen; None: all are."""
    lookup: _Lookup
    """Of the keys of their chunk and of all before it."""


class _Lookup(NamedTuple):
    """The ids of keys, and of the tokens behind them, sorted by row; None: they are compared."""

    tokens: SortedKeys | None = None
    successors: SortedKeys | None = None

    @staticmethod
    def of(earlier: Keys, own: Keys) -> _Lookup:
        """Of the keys of a chunk and of all before it."""
        if not lists_places(own.text):
            return _Lookup()
        _, *both = (torch.cat(ids, dim=1) for ids in _both(earlier, own))
        return _Lookup(*(SortedKeys(SortedIds.of(ids), 0, ids.shape[1]) for ids in both))

    @staticmethod
    def of_text(text: Tensor) -> _Lookup:
        """Of keys whose ids and successors are those of one text, :attr:`Keys.text`, and of which
        there are many.
        """
        if not lists_places(text) or text.shape[1] < FEWEST_LOOKED_UP:
            return _Lookup()
        rows, count = SortedIds.of(text), text.shape[1] - 2
        return _Lookup(SortedKeys(rows, 1, count), SortedKeys(rows, 2, count))


class EarlierKeys(NamedTuple):
    """What all queries of a chunk find alike in the keys of the chunks before it."""

    bias: Tensor
    """(H, J), by distance"""
    known: Tensor
    """(B, J): whether the token behind a key is"""
    lookup: _Lookup

    @staticmethod
    def of(keys: Keys, scoring: Scoring) -> EarlierKeys:
        """Of whole chunks."""
        bias = _bias_by_chunk(keys.num_keys, scoring)
        return EarlierKeys(bias, keys.text[:, 2:] >= 0, _Lookup.of_text(keys.text))


class _Scan(NamedTuple):
    """What :func:`point` is called with beside queries."""

    earlier: Keys
    own: Keys
    scoring: Scoring
    targets: Tensor
    first_chunk: int
    from_chunk: Tensor | None
    chunks: Sequence[int] | None

    def of(self, earlier: Tensor, own: Tensor, distance_bias: Tensor, match_bonus: Tensor) -> _Scan:
        """The same with other keys and numbers."""
        scoring = self.scoring._replace(distance_bias=distance_bias, match_bonus=match_bonus)
        return self._replace(
            earlier=self.earlier._replace(keys=earlier),
            own=self.own._replace(keys=own),
            scoring=scoring,
        )

    def scores(self, queries: Tensor, block: _Block) -> _Scores:
        """Of a block's queries (B, H, R, D)."""
        seen = _seen_in_window(queries, block, self.scoring)
        return _scores(queries, seen, self.scoring.match_bonus)

    def blocks(self, queries: Tensor) -> Iterator[_Block]:
        """Cut queries (B, H, T, D) where chunks end, and into as many as are computed at once."""
        size, length = self.scoring.chunk_size, queries.shape[2]
        budget = self.scoring.at_once or SCORES_AT_ONCE.get(queries.device.type, 1 << 22)
        numbers = range(-(-length // size)) if self.chunks is None else self.chunks
        for number, start in zip(numbers, range(0, length, size), strict=True):
            chunk, end = self.first_chunk + number, min(start + size, length)
            earlier = self.earlier.cut(0, chunk * size)
            columns = queries.shape[0] * queries.shape[1] * (earlier.num_keys + end - start)
            rows = max(budget // columns, 1)
            whole = self.own.cut(number * size, number * size + end - start)
            lookup = _Lookup.of(earlier, whole)
            begin = None if self.from_chunk is None else self.from_chunk[:, number : number + 1]
            for row in range(start, end, rows):
                stop = min(row + rows, end)
                offsets = torch.arange(row - start, stop - start, device=queries.device)
                own = self.own.cut(number * size, number * size + stop - start)
                yield _Block(slice(row, stop), offsets, number * size, earlier, own, begin, lookup)


class _Seen(NamedTuple):
    """What a block's queries are compared with: keys of earlier chunks, then those of their own.
    G is H where each pointer has keys of its own, and 1 where all have the same.
    """

    keys: tuple[Tensor, Tensor]
    """(B, H, J, D) of earlier chunks, and of the own one"""
    bias: Tensor
    """(B or 1, H, K), by distance"""
    before: Tensor
    """(B, G, K) ids: the token before each key's"""
    tokens: KeyIds
    """The key's"""
    successors: KeyIds
    """The one behind it"""
    visible: Visible
    """Those whose successor is known, and read before the query's token"""
    wanted: tuple[Tensor, Tensor]
    """(B, R) ids: the token before each query's, and the query's"""


class _Scores(NamedTuple):
    """Of keys of earlier chunks, then those of the own one."""

    scores: Tensor
    """(B, H, R, K) in at least fp32; -inf at what is not seen."""
    same: SameTokens
    """Of what is seen the keys with the query's token."""
    successors: KeyIds

    def followed_by(self, ids: Tensor) -> Found:
        """The keys behind which came an id of each query, (B, H or 1, R)."""
        return self.successors.having(ids, _shape(self.scores))


def _shape(scores: Tensor) -> Shape:
    batch, pointers, queries, keys = scores.shape
    return batch, pointers, queries, keys


def _scores(queries: Tensor, seen: _Seen, match_bonus: Tensor) -> _Scores:
    """Scores of a block's queries (B, H, R, D)."""
    queries = _precise(queries)
    same_type = seen.keys[0].dtype == seen.keys[1].dtype
    if same_type and queries.shape[2] > queries.shape[3]:  # keys are fewer numbers than scores
        scores = _products(queries, torch.cat(seen.keys, dim=2))
    else:
        scores = torch.cat([_products(queries, part) for part in seen.keys], -1)
    seen.visible.add_(scores, seen.bias)
    before, token = seen.wanted
    having = seen.tokens.having(token.unsqueeze(1), _shape(scores))
    same = having.seen(seen.visible, seen.before, before)
    same.add_(scores, match_bonus)
    return _Scores(scores, same, seen.successors)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """(B, H, R, D), keys (B, H, J, D) -> (B, H, R, J)"""
    if keys.dtype == torch.int8:
        queries = queries / 127
    few = queries.shape[2] <= queries.shape[3]  # scores are fewer numbers than keys
    if few and keys.dtype != queries.dtype and keys.device.type == "cpu":
        return _products_by_parts(queries.detach(), keys)
    return queries @ keys.to(queries.dtype).transpose(-1, -2)


def _products_by_parts(queries: Tensor, keys: Tensor) -> Tensor:
    """The same without a gradient, through one buffer: a new tensor for each part is given back to
    the system and taken from it again, at four times the time of all else.
    """
    most = min(CONVERTED_AT_ONCE, keys.shape[2])
    buffer = queries.new_empty(*keys.shape[:2], most, keys.shape[3])
    scores = queries.new_empty(*queries.shape[:3], keys.shape[2])
    for part, to in zip(
        keys.split(CONVERTED_AT_ONCE, 2), scores.split(CONVERTED_AT_ONCE, 3), strict=True
    ):
        converted = buffer[:, :, : part.shape[2]].copy_(part)
        to.copy_(queries @ converted.transpose(-1, -2))
    return scores


def _seen_in_window(
    queries: Tensor, block: _Block, scoring: Scoring, in_earlier: EarlierKeys | None = None
) -> _Seen:
    """All earlier keys of a block; of each query's own choice where ``most_chunks`` says so.
    ``in_earlier``: see :func:`pointed_at`.
    """
    before, tokens, successors = (
        torch.cat(ids, dim=1).unsqueeze(1) for ids in _both(block.earlier, block.own)
    )
    count, chosen = block.earlier.num_keys, None
    if in_earlier is None:
        known = successors >= 0
    else:
        known = torch.cat([in_earlier.known, block.own.text[:, 2:] >= 0], dim=1).unsqueeze(1)
    wanted_before = block.own.text[:, block.offsets]
    if block.from_chunk is not None:
        keys = torch.arange(tokens.shape[2], device=queries.device)
        begin = block.from_chunk * scoring.chunk_size  # (B, 1)
        known = known & (keys >= begin).unsqueeze(1)
    most = scoring.most_chunks
    if most is not None and most * scoring.chunk_size < count:
        chosen = _chosen(_precise(queries), block, most, scoring)
    return _Seen(
        (block.earlier.keys, block.own.keys),
        _bias_by_key(block, scoring, in_earlier).unsqueeze(0),
        before,
        KeyIds(tokens, block.lookup.tokens),
        KeyIds(successors, block.lookup.successors),
        Visible(known, count, block.offsets, chosen),
        (_unlike_keys(wanted_before), block.own.text[:, 1 + block.offsets]),
    )


def _both(earlier: Keys, own: Keys) -> Iterator[tuple[Tensor, Tensor]]:
    """Of both (B, J) each: the ids before keys, of keys, and behind them."""
    return zip(_triples(earlier.text), _triples(own.text), strict=True)


def _triples(text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., J + 2) -> (..., J) each: the ids before keys, of keys, and behind them."""
    return text[..., :-2], text[..., 1:-1], text[..., 2:]


def _unlike_keys(before: Tensor) -> Tensor:
    """What is not known of a query is unlike what is not known of a key."""
    return before.masked_fill(before < 0, _UNKNOWN - 1)


def _bias_by_key(block: _Block, scoring: Scoring, in_earlier: EarlierKeys | None) -> Tensor:
    """(H, K)"""
    far = _bias_by_chunk(block.earlier.num_keys, scoring) if in_earlier is None else in_earlier.bias
    own = scoring.distance_bias[:, :1].expand(-1, block.own.num_keys)
    return torch.cat([far, own], dim=1)


def _bias_by_chunk(num_keys: int, scoring: Scoring) -> Tensor:
    """(H, J) of keys of earlier chunks"""
    far = scoring.distance_bias[:, _distances(num_keys, scoring)]  # (H, chunks)
    return far.repeat_interleave(scoring.chunk_size, dim=1)


def _distances(num_keys: int, scoring: Scoring) -> Tensor:
    """The column of ``distance_bias`` for each earlier chunk of keys."""
    distances = torch.arange(
        num_keys // scoring.chunk_size, 0, -1, device=scoring.distance_bias.device
    )
    return distances.clamp(max=scoring.distance_bias.shape[1] - 1)


def mean_keys(keys: Tensor, chunk_size: int) -> Tensor:
    """Keys (B, H, J, D) of whole chunks -> (B, H, chunks, D) in at least fp32."""
    means = _precise(keys).unflatten(2, (-1, chunk_size)).mean(3)
    return means / 127 if keys.dtype == torch.int8 else means


def _mean_scores(queries: Tensor, means: Tensor, scoring: Scoring) -> Tensor:
    """The mean over each earlier chunk's keys of scores, tokens that are the same aside: queries
    (B, H, R, D), :func:`mean_keys` (B, H, chunks, D) -> (B, H, R, chunks).
    """
    distances = _distances(means.shape[2] * scoring.chunk_size, scoring)
    bias = scoring.distance_bias[:, distances].unsqueeze(1)  # (H, 1, chunks)
    return queries @ means.to(queries.dtype).transpose(-1, -2) + bias


def _chosen(queries: Tensor, block: _Block, most: int, scoring: Scoring) -> Tensor:
    """Which keys are of the earlier chunks that each query sees, or of its own: (B, H, R, K)."""
    size = scoring.chunk_size
    similar = _mean_scores(queries, mean_keys(block.earlier.keys, size), scoring)
    if block.from_chunk is not None:
        places = torch.arange(similar.shape[3], device=similar.device)
        similar = similar.masked_fill((places < block.from_chunk)[:, None, None], -torch.inf)
    best = similar.topk(most, dim=-1).indices
    chosen = torch.zeros_like(similar, dtype=torch.bool).scatter_(-1, best, True)
    chosen = chosen.repeat_interleave(size, dim=-1)
    return torch.cat([chosen, chosen.new_ones(*chosen.shape[:3], block.own.num_keys)], dim=-1)


def _seen_by_one(
    queries: Tensor, block: _Block, scoring: Scoring, means: Tensor, most: int
) -> _Seen:
    """As :func:`_seen_in_window` where each row has one query (B, H, 1, D), which chooses ``most``
    chunks: the keys of others are not read. ``means``: :func:`mean_keys` of the earlier ones.
    """
    size = scoring.chunk_size
    similar = _mean_scores(_precise(queries).to(means.dtype), means, scoring)
    chunks = similar.squeeze(2).topk(most, dim=-1).indices.sort(dim=-1).values  # (B, H, M)
    row, pointer = (
        torch.arange(n, device=chunks.device).view(shape)
        for n, shape in ((chunks.shape[0], (-1, 1, 1)), (chunks.shape[1], (1, -1, 1)))
    )
    keys = block.earlier.keys.unflatten(2, (-1, size))[row, pointer, chunks].flatten(2, 3)
    distances = block.earlier.num_keys // size - chunks
    bias = scoring.distance_bias
    far = bias[pointer, distances.clamp(max=bias.shape[1] - 1)].repeat_interleave(size, dim=2)
    near = bias[:, :1].expand(len(far), -1, block.own.num_keys)
    text = block.earlier.text.unfold(1, size + 2, size)[row, chunks]  # (B, H, M, S + 2)
    own = block.own.text.unsqueeze(1).expand(-1, chunks.shape[1], -1)
    before, tokens, successors = (
        torch.cat([earlier.flatten(2), mine], dim=2)
        for earlier, mine in zip(_triples(text), _triples(own), strict=True)
    )
    unread = torch.arange(-keys.shape[2], block.own.num_keys, device=keys.device) >= block.offsets
    return _Seen(
        (keys, block.own.keys),
        torch.cat([far, near], dim=2),
        before,
        KeyIds(tokens),
        KeyIds(successors),
        Visible((successors >= 0) & ~unread, keys.shape[2], None),
        (_unlike_keys(block.own.text[:, block.offsets]), block.own.text[:, 1 + block.offsets]),
    )


def _weights(scores: Tensor, nothing: Tensor) -> Tensor:
    """The softmax in place of scores (B, H, R, K); 0 in rows (B, H, R) that see nothing. It is one
    operator: each row stays in a CPU's cache from its largest score to the division by its sum.
    """
    first = scores[..., 0]
    first.masked_fill_(nothing, 0.0)
    torch.softmax(scores, -1, out=scores)
    first.masked_fill_(nothing, 0.0)
    return scores


def _weigh(found: _Scores) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Weights, in place of the scores, and what is known of how sure they are: all of
    :class:`Pointers` but the probability.
    """
    most, nearest = largest(found.scores)  # (B, H, R)
    nothing = most == -torch.inf
    weights = _weights(found.scores, nothing)
    peak = weights.gather(-1, nearest.unsqueeze(-1)).squeeze(-1).log()
    successors = found.successors.ids.expand(-1, nearest.shape[1], -1)  # (B, H, K)
    agrees = found.followed_by(successors.gather(2, nearest))
    agreement = agrees.sums(weights).log()
    longest = found.same.longest().expand_as(most)
    return weights, (most, *(x.masked_fill(nothing, 0.0) for x in (peak, agreement)), longest)


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """As ``scores.max(-1)``, which on a CPU takes as long as an exponential of all: the largest of
    each of some spans first, then its place in the span that has it.
    """
    span, count = SPAN, scores.shape[-1]
    whole = count - count % span
    if scores.device.type != "cpu" or whole < 2 * span:
        return scores.max(-1)
    spans = scores[..., :whole].unflatten(-1, (-1, span)).amax(-1)
    values, number = torch.cat([spans, scores[..., whole:]], dim=-1).max(-1)
    inside = number < whole // span
    first = number.where(inside, 0) * span
    places = first.unsqueeze(-1) + torch.arange(span)
    place = first + scores.gather(-1, places).argmax(-1)
    return values, place.where(inside, number - whole // span + whole)


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
        probability, largest, peak, agreement = (torch.empty_like(empty) for _ in range(4))
        longest = torch.empty_like(empty, dtype=torch.long)
        for block in scan.blocks(queries):
            part = (..., block.rows)
            found = scan.scores(queries[:, :, block.rows], block)
            weights, sureness = _weigh(found)
            largest[part], peak[part], agreement[part], longest[part] = sureness
            hits = found.followed_by(scan.targets[:, None, block.rows])
            probability[part] = hits.sums(weights)
        ctx.save_for_backward(
            queries, earlier_keys, own_keys, distance_bias, match_bonus, probability, largest
        )
        ctx.scan = scan
        ctx.mark_non_differentiable(largest, peak, agreement, longest)
        return probability, largest, peak, agreement, longest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_probability = grads[0]
        queries, *parameters, probability, largest = ctx.saved_tensors
        scan: _Scan = ctx.scan.of(*parameters)
        by_queries, *by_parameters = (
            torch.zeros_like(x, dtype=largest.dtype) for x in (queries, *parameters)
        )
        for block in scan.blocks(queries):
            part = (..., block.rows)
            rows = queries[:, :, block.rows]
            found = scan.scores(rows, block)
            weights = _weights(found.scores, largest[part] == -torch.inf)
            scale, known = by_probability[part], probability[part]
            hits = found.followed_by(scan.targets[:, None, block.rows])
            by_scores = hits.multiply_(weights, scale * (1 - known), -scale * known)
            found = found._replace(scores=by_scores)
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
    by_bias.index_add_(1, _distances(count, scan.scoring), by_chunk)
    by_bias[:, 0] += by_key[:, count:].sum(1)
    by_bonus += found.same.by_bonus(by_scores)
    return by_queries


def point(
    queries: Tensor,
    earlier: Keys,
    own: Keys,
    scoring: Scoring,
    targets: Tensor,
    first_chunk: int = 0,
    from_chunk: Tensor | None = None,
    chunks: Sequence[int] | None = None,
) -> Pointers:
    """Each query's pointers at earlier tokens, and what they say of its target.

    Args:
        queries: (B, H, T, D), scaled: their products with keys are the scores. The first is the
            first token of its chunk.
        earlier: keys of whole chunks: a query sees those of the chunks before its own.
        own: the keys of the same tokens as the queries: one sees those of its chunk before it.
        targets: (B, T) ids; negative: none, which nothing predicts.
        first_chunk: number of the first own key's chunk, counted from that of the first earlier
            key.
        from_chunk: (B, chunks) for the queries of each of ``own``'s chunks the first chunk that
            they see, all counted as ``first_chunk`` is; None: they see all.
        chunks: where ``own`` has further tokens, the numbers of the queries' chunks among its;
            None: it has none.
    """
    scan = _Scan(earlier, own, scoring, targets, first_chunk, from_chunk, chunks)
    parameters = (earlier.keys, own.keys, scoring.distance_bias, scoring.match_bonus)
    return Pointers(*_CopyAttention.apply(queries, *parameters, scan))


def pointed_at(
    queries: Tensor,
    offsets: Tensor,
    earlier: Keys,
    own: Keys,
    scoring: Scoring,
    means: Tensor | None = None,
    in_earlier: EarlierKeys | None = None,
) -> tuple[Tensor, Tensor, Pointers]:
    """Weights (B, H, T, K) of the keys that are compared with queries of one chunk, the tokens
    behind these keys (B, H or 1, K), and the pointers, without any target. No gradient.

    Args:
        queries: (B, H, T, D), scaled.
        offsets: (T,) their places in their chunk.
        earlier: keys of all chunks before it.
        own: keys of the chunk from its first token to at least the last of ``offsets``.
        means: :func:`mean_keys` of the earlier ones. With them, and one query a row, only the keys
            of the ``most_chunks`` that it sees are read.
        in_earlier: :meth:`EarlierKeys.of` the earlier ones; None: it is made.
    """
    lookup = _Lookup() if in_earlier is None else in_earlier.lookup
    block = _Block(slice(None), offsets, 0, earlier, own, None, lookup)
    most = scoring.most_chunks
    if most is not None and means is not None and most < means.shape[2] and len(offsets) == 1:
        seen = _seen_by_one(queries, block, scoring, means, most)
    else:
        seen = _seen_in_window(queries, block, scoring, in_earlier)
    found = _scores(queries, seen, scoring.match_bonus)
    weights, sureness = _weigh(found)
    nothing = torch.zeros_like(sureness[0])
    return weights, found.successors.ids, Pointers(nothing, *sureness)
