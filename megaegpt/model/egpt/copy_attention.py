"""Attention that points at earlier tokens and says which token followed them.

A pointer gives each earlier token j a weight a_j, the softmax of scores, and so predicts a token y
with the probability of all tokens that y followed:

    p(y) = sum_j a_j [x_j+1 = y]

as continuous caches do (Grave et al., arXiv 1612.04426) and, over a data store, kNN-LMs (Khandelwal
et al., arXiv 1911.00172). In training only the probability of each target is needed. It is computed
for some rows at a time and once more in the backward pass, so that nothing of (tokens x keys), and
nothing at all of (tokens x vocabulary), is kept.

Shapes: B batch, T queries, S chunk size, J keys: of whole chunks, in order, H pointers, D key
width, R distances that are told apart, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Scores that exist at once, by device type."""


class Keys(NamedTuple):
    """Earlier tokens that pointers choose among."""

    keys: Tensor
    """(B, H, J, D); int8: in units of 1 / 127, without a gradient"""
    successors: Tensor
    """(B, J): the token behind each; negative: it is not known, and the key is not seen."""
    distance_bias: Tensor
    """(H, R): added to the scores of the chunks 1, 2, ... before the query's; the last is also that
    of all chunks before."""
    chunk_size: int
    most_chunks: int | None = None
    """Chunks that a query sees, those whose mean key its scores are highest for; None: all."""


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


class _Block(NamedTuple):
    """Queries of one chunk that are computed together."""

    rows: slice
    num_keys: int
    """Keys of the chunks before theirs."""
    chunk: int
    """Number of their chunk, counted from that of the first key."""


def _blocks(queries: Tensor, memory: Keys, first_chunk: int) -> Iterator[_Block]:
    """Cut queries (B, H, T, D), whose first is the first of a chunk, where chunks end."""
    size, length = memory.chunk_size, queries.shape[2]
    budget = SCORES_AT_ONCE.get(queries.device.type, 1 << 22)
    for start in range(0, length, size):
        chunk = first_chunk + start // size
        num_keys = min(chunk * size, memory.keys.shape[2])
        if num_keys == 0:
            continue
        rows = max(budget // (queries.shape[0] * queries.shape[1] * num_keys), 1)
        end = min(start + size, length)
        for row in range(start, end, rows):
            yield _Block(slice(row, min(row + rows, end)), num_keys, chunk)


def _distances(memory: Keys, block: _Block) -> Tensor:
    """The column of ``distance_bias`` for each of the block's chunks of keys."""
    chunks = -(-block.num_keys // memory.chunk_size)
    numbers = torch.arange(chunks, device=memory.keys.device)
    return (block.chunk - numbers - 1).clamp(max=memory.distance_bias.shape[1] - 1)


def _scores(queries: Tensor, memory: Keys, block: _Block, from_chunk: Tensor | None) -> Tensor:
    """Scores (B, H, rows, num_keys) in at least fp32 of queries (B, H, rows, D); -inf at what is
    not seen.

    Args:
        from_chunk: (B,) the first chunk that is seen; None: all are.
    """
    precise = torch.promote_types(queries.dtype, torch.float32)
    size, count = memory.chunk_size, block.num_keys
    keys = memory.keys[:, :, :count].to(precise)
    if memory.keys.dtype == torch.int8:
        queries = queries / 127
    scores = queries.to(precise) @ keys.transpose(-1, -2)
    bias = memory.distance_bias.to(precise)[:, _distances(memory, block)]  # (H, chunks)
    scores += bias.repeat_interleave(size, dim=1)[None, :, None, :count]
    unseen = memory.successors[:, :count] < 0  # (B, num_keys)
    if from_chunk is not None:
        numbers = torch.arange(count, device=unseen.device) // size
        unseen = unseen | (numbers < from_chunk.unsqueeze(1))
    scores.masked_fill_(unseen[:, None, None], -torch.inf)
    if memory.most_chunks is not None and memory.most_chunks < bias.shape[1]:
        scores.masked_fill_(~_chosen(queries.to(precise), keys, memory, bias.shape[1]), -torch.inf)
    return scores


def _chosen(queries: Tensor, keys: Tensor, memory: Keys, chunks: int) -> Tensor:
    """Which keys are of the chunks that each query sees: (B, H, rows, num_keys)."""
    means = keys.unflatten(2, (chunks, memory.chunk_size)).mean(3)  # (B, H, chunks, D)
    similar = queries @ means.transpose(-1, -2)  # (B, H, rows, chunks)
    best = similar.topk(memory.most_chunks or chunks, dim=-1).indices
    chosen = torch.zeros_like(similar, dtype=torch.bool).scatter_(-1, best, True)
    return chosen.repeat_interleave(memory.chunk_size, dim=-1)


def _weights(scores: Tensor, log_sum: Tensor) -> Tensor:
    """exp(scores - log_sum) in place; 0 in rows that see nothing."""
    nothing = log_sum == -torch.inf
    return scores.sub_(log_sum.masked_fill(nothing, 0.0).unsqueeze(-1)).exp_()


def _weigh(
    scores: Tensor, successors: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Weights, in place of the scores (B, H, rows, num_keys), their log_sum (B, H, rows), and how
    sure they are: ``largest``, ``peak`` and ``agreement``, see :class:`Pointers`.
    """
    log_sum = scores.logsumexp(-1)
    largest, nearest = scores.max(-1)  # (B, H, rows)
    nothing = largest == -torch.inf
    weights = _weights(scores, log_sum)
    known = successors[:, : scores.shape[-1]]  # (B, num_keys)
    likeliest = known.gather(1, nearest.flatten(1)).view_as(nearest)
    agrees = known[:, None, None] == likeliest.unsqueeze(-1)
    agreement = (weights * agrees).sum(-1).log().masked_fill(nothing, 0.0)
    return weights, log_sum, (largest, (largest - log_sum).masked_fill(nothing, 0.0), agreement)


class _CopyAttention(torch.autograd.Function):
    """The probability is differentiable by queries, keys and distance_bias."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        distance_bias: Tensor,
        memory: Keys,
        targets: Tensor,
        first_chunk: int,
        from_chunk: Tensor | None,
    ) -> tuple[Tensor, ...]:
        precise = torch.promote_types(queries.dtype, torch.float32)
        memory = memory._replace(keys=keys, distance_bias=distance_bias)
        shape, device = queries.shape[:3], queries.device
        probability, log_sum, peak, agreement = (
            torch.zeros(shape, dtype=precise, device=device) for _ in range(4)
        )
        largest = torch.full(shape, -torch.inf, dtype=precise, device=device)
        for block in _blocks(queries, memory, first_chunk):
            part = (..., block.rows)
            scores = _scores(queries[:, :, block.rows], memory, block, _row(from_chunk, block))
            weights, log_sum[part], sureness = _weigh(scores, memory.successors)
            largest[part], peak[part], agreement[part] = sureness
            probability[part] = weights.mul_(_hits(memory, targets, block)).sum(-1)
        ctx.save_for_backward(queries, keys, distance_bias, targets, probability, log_sum)
        ctx.memory, ctx.first_chunk, ctx.from_chunk = memory, first_chunk, from_chunk
        ctx.mark_non_differentiable(largest, peak, agreement)
        return probability, largest, peak, agreement

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_probability = grads[0]
        queries, keys, distance_bias, targets, probability, log_sum = ctx.saved_tensors
        memory: Keys = ctx.memory._replace(keys=keys, distance_bias=distance_bias)
        by_queries = torch.zeros_like(queries, dtype=log_sum.dtype)
        by_keys = torch.zeros_like(keys, dtype=log_sum.dtype)
        by_bias = torch.zeros_like(distance_bias, dtype=log_sum.dtype)
        for block in _blocks(queries, memory, ctx.first_chunk):
            part = (..., block.rows)
            rows = queries[:, :, block.rows]
            scores = _scores(rows, memory, block, _row(ctx.from_chunk, block))
            weights = _weights(scores, log_sum[part])
            hits = _hits(memory, targets, block).to(weights.dtype)
            factor = hits - probability[part].unsqueeze(-1)
            factor *= by_probability[part].unsqueeze(-1)
            by_scores = weights.mul_(factor)  # (B, H, rows, num_keys)
            seen = slice(0, block.num_keys)
            by_queries[:, :, block.rows] = by_scores @ keys[:, :, seen].to(by_scores.dtype)
            by_keys[:, :, seen] += by_scores.transpose(-1, -2) @ rows.to(by_scores.dtype)
            by_chunk = _sums_of_chunks(by_scores.sum((0, 2)), memory.chunk_size)
            by_bias.index_add_(1, _distances(memory, block), by_chunk)
        return (
            by_queries.to(queries.dtype),
            by_keys.to(keys.dtype),
            by_bias.to(distance_bias.dtype),
            *(None,) * 4,
        )


def _row(from_chunk: Tensor | None, block: _Block) -> Tensor | None:
    """The column (B,) of from_chunk (B, chunks) that is the block's."""
    return None if from_chunk is None else from_chunk[:, block.chunk]


def _hits(memory: Keys, targets: Tensor, block: _Block) -> Tensor:
    """Where keys are followed by the target: (B, 1, rows, num_keys)."""
    rows = targets[:, block.rows].unsqueeze(2)
    return (memory.successors[:, : block.num_keys].unsqueeze(1) == rows).unsqueeze(1)


def _sums_of_chunks(by_key: Tensor, size: int) -> Tensor:
    """(H, num_keys) -> (H, chunks)"""
    return by_key.unflatten(1, (-1, size)).sum(2)


def point(
    queries: Tensor,
    memory: Keys,
    targets: Tensor,
    first_chunk: int = 0,
    from_chunk: Tensor | None = None,
) -> Pointers:
    """Each query's pointers at the tokens of the chunks before its own, and what they say of its
    target.

    Args:
        queries: (B, H, T, D), scaled: their products with keys are the scores. The first is the
            first token of its chunk.
        memory: its keys are of whole chunks.
        targets: (B, T) ids; negative: none, which nothing predicts.
        first_chunk: number of the first query's chunk, counted from that of the first key.
        from_chunk: (B, chunks) for each chunk's queries the first chunk that they see, all counted
            as ``first_chunk`` is; None: they see all.
    """
    found = _CopyAttention.apply(
        queries, memory.keys, memory.distance_bias, memory, targets, first_chunk, from_chunk
    )
    return Pointers(*found)


def pointed_at(queries: Tensor, memory: Keys, chunk: int) -> tuple[Tensor, Pointers]:
    """Weights (B, H, T, J) of all keys for queries of one chunk, whose number is counted from the
    first key's, and the pointers, without any target. No gradient.
    """
    count = memory.keys.shape[2]
    zeros = queries.new_zeros(queries.shape[:3], dtype=torch.float32)
    if count == 0:
        return zeros.unsqueeze(-1)[..., :0], Pointers(zeros, zeros - torch.inf, zeros, zeros)
    scores = _scores(queries, memory, _Block(slice(0, queries.shape[2]), count, chunk), None)
    weights, _, sureness = _weigh(scores, memory.successors)
    return weights, Pointers(zeros, *sureness)
