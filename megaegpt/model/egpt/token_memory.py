"""A memory of tokens: what followed earlier tokens at which the encoder was in a similar state.

A feature says what a chunk is about, not what was said. So each token leaves a key, a few numbers
made of its encoder state, beside its id. A later token's query is compared with all keys of earlier
chunks and with those before it in its own, and the tokens behind the similar ones are predicted
again:

    p(y) = g_0 p_head(y) + sum_h g_h sum_j a_hj [x_j+1 = y]

with pointers h (:mod:`megaegpt.model.egpt.copy_attention`), whose scores are a learned scale times
the cosine of query and key, a bias by the distance in chunks, and a bonus where the last one or two
tokens are the same at both places. Their shares g are a softmax over the head and the pointers (as
in pointer-sentinel mixtures, Merity et al., arXiv 1609.07843), chosen by the hidden state, by how
sure each pointer is, and by the longest match that it sees. A new memory is a continuous cache
(Grave et al., arXiv 1612.04426): queries and keys are one projection, the scale is high, the share
small.

Shapes: B batch, T tokens, N chunks, S chunk size, J keys of earlier chunks, K keys with those of
the own chunk, C hidden, H pointers, D key width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.model.block import block_norm
from megaegpt.model.egpt.copy_attention import (
    EarlierKeys,
    Keys,
    Pointers,
    Scoring,
    point,
    pointed_at,
)
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import new_parameter

_SCALE = 35.0
"""Factor on cosines in a new memory."""
_SHARE = 0.08
"""Of all pointers together in a new memory; near the best constant share."""
_SURENESS = (0.4, 0.0, 0.1)
"""What nearness, peak and agreement add to a gate in a new memory."""
_DISTANCE = (0.35, 0.35, 0.1, 0.0, -0.1)
"""Added to scores of the own chunk, the one before, ... in a new memory; what trained ones tend to,
as all that follows."""
_FAR = -0.2
"""The same of all chunks before those."""
_BONUS = (0.3, 1.7)
"""Added to scores where one token, or two, are the same in a new memory."""
_MATCH = (-1.0, 0.0, 0.5)
"""What the longest match that is seen, of no token to two, adds to a gate in a new memory."""
_RATE = 8.0
"""Scales, distances, bonuses and what sureness and matches add are parameters times this: few
numbers that must move as far in a run as the scores they are added to, not as weights do."""
_NEAR, _NEARNESS = 0.8, 10.0
"""Cosines of near keys, and the factor that gives their differences the size of logs of weights."""


class Query(NamedTuple):
    """What tokens ask a memory, and by what they weigh its answer."""

    queries: Tensor
    """(B, H, T, D), scaled."""
    gates: Tensor
    """(B, H, T): logits of the pointers' shares beside the head's 0, by the hidden state alone."""


class TokenMemory(nn.Module):
    """Projections, scale, distances and gates. Replicated over TP ranks."""

    def __init__(self, config: ModelConfig, grid: ProcessGrid) -> None:
        super().__init__()
        egpt, std = config.egpt, config.init_std
        self.pointers, self.dim = egpt.memory_pointers, egpt.memory_dim
        self.chunk_size = egpt.chunk_size
        self.window_tokens = (egpt.num_chunks - 1) * egpt.chunk_size
        self.most_chunks = egpt.memory_chunks
        pointers, width, chunks = self.pointers, config.hidden_size, egpt.num_chunks
        self.norm = block_norm(config, grid)
        projection = (pointers * self.dim, width)
        self.query = new_parameter(projection, grid, std=std)
        self.key = new_parameter(projection, grid, std=std)
        self.log_scale = new_parameter((pointers,), grid, mean=math.log(_SCALE) / _RATE)
        self.distance = _constants((*_DISTANCE, *[_FAR] * chunks)[:chunks], pointers, grid)
        self.bonus = _constants(_BONUS, pointers, grid)
        self.gate = new_parameter((pointers, width), grid)
        bias = math.log(_SHARE / (1 - _SHARE) / pointers)
        self.gate_bias = new_parameter((pointers,), grid, mean=bias)
        self.by_nearness, self.by_peak, self.by_agreement = (
            new_parameter((pointers,), grid, mean=mean / _RATE) for mean in _SURENESS
        )
        self.by_match = _constants(_MATCH, pointers, grid)
        self.scores_at_once: int | None = None
        """See :class:`~megaegpt.model.egpt.copy_attention.Scoring`."""
        self._noted: Tensor | None = None
        """(2,): the sum of shares, and of how many tokens."""

    def keys(self, states: Tensor) -> Tensor:
        """Encoder states (B, J, C) -> keys (B, H, J, D) of unit length."""
        return self._projected(states, self.key)

    def ask(self, states: Tensor, hidden: Tensor) -> Query:
        """Encoder states (B, T, C) and what the head reads of the same tokens (B, T, C)."""
        scale = self.scale.to(torch.promote_types(hidden.dtype, torch.float32))
        unit = self._projected(states, self.query)
        queries = unit.to(scale.dtype) * scale.view(1, -1, 1, 1)
        gates = F.linear(hidden, self.gate, self.gate_bias).transpose(1, 2)
        return Query(queries, gates.to(scale.dtype))

    @property
    def scale(self) -> Tensor:
        """(H,): the factor on cosines."""
        precise = torch.promote_types(self.log_scale.dtype, torch.float32)
        return (_RATE * self.log_scale.to(precise)).exp()

    def note_shares(self, log_shares: Tensor, targets: Tensor) -> None:
        """Let :meth:`mean_share` be that of these tokens too: (B, 1 + H, T), and their targets
        (B, T), negative where there is none, of padding say, which counts for nothing.
        """
        real = targets >= 0
        share = -log_shares[:, 0].detach().expm1().masked_fill(~real, 0.0)
        noted = torch.stack((share.sum(dtype=torch.float64), real.sum(dtype=torch.float64)))
        self._noted = noted if self._noted is None else self._noted + noted

    def mean_share(self) -> float | None:
        """Of all pointers together, 0 to 1, over this rank's tokens since the last time that it was
        asked for; None: there were none.
        """
        noted, self._noted = self._noted, None
        total, tokens = (0.0, 0.0) if noted is None else noted.tolist()
        return total / tokens if tokens else None

    def _projected(self, states: Tensor, weight: Tensor) -> Tensor:
        projected = F.linear(self.norm(states), weight).unflatten(-1, (self.pointers, -1))
        return F.normalize(projected, dim=-1).transpose(1, 2)

    def scoring(self) -> Scoring:
        """What scores are made of beside queries and keys."""
        bias, bonus = _RATE * self.distance, _RATE * self.bonus
        return Scoring(bias, bonus, self.chunk_size, self.most_chunks, self.scores_at_once)

    def log_shares(self, query: Query, found: Pointers) -> Tensor:
        """Log of the shares of the head and the pointers, (B, 1 + H, T)."""
        nothing = found.largest == -torch.inf
        cosine = found.largest.masked_fill(nothing, 0.0) / self.scale.detach().unsqueeze(1)
        nearness = _NEARNESS * (cosine - _NEAR)
        gates = query.gates
        for how_sure, weight in (
            (nearness, self.by_nearness),
            (found.peak, self.by_peak),
            (found.agreement, self.by_agreement),
        ):
            gates = gates + how_sure * (_RATE * weight).unsqueeze(1)
        by_match = (_RATE * self.by_match).expand(len(gates), -1, -1)  # (B, H, 3)
        gates = gates + by_match.gather(2, found.longest)
        gates = gates.masked_fill(nothing, -torch.inf)
        return F.pad(gates, (0, 0, 1, 0)).log_softmax(1)  # the head's logit is 0


def _constants(values: tuple[float, ...], pointers: int, grid: ProcessGrid) -> nn.Parameter:
    """(H, len(values)): the same for all pointers at first."""
    mean = tuple(value / _RATE for value in values)
    return new_parameter((pointers, len(values)), grid, mean=mean, vectors=True)


def _each(ids: Tensor, pointers: int) -> tuple[Tensor, ...]:
    """(B, H or 1, K) -> (B, K) for each pointer."""
    return ids.expand(-1, pointers, -1).unbind(1)


class MemoryMixture:
    """The mixture of the head's predictions with those of a memory.

    Args:
        module: the memory's parameters.
        query: of T tokens, the first of which is the first of its chunk.
        earlier: keys of whole chunks; a token sees those of the chunks before its own.
        own: the keys of the T tokens, or of more.
        first_chunk, from_chunk, chunks: see :func:`~megaegpt.model.egpt.copy_attention.point`. With
            ``from_chunk`` or ``chunks`` the mixture gives probabilities of targets alone.
    """

    def __init__(
        self,
        module: TokenMemory,
        query: Query,
        earlier: Keys,
        own: Keys,
        first_chunk: int = 0,
        from_chunk: Tensor | None = None,
        chunks: Sequence[int] | None = None,
    ) -> None:
        self._module, self._query, self._earlier, self._own = module, query, earlier, own
        self._first_chunk = first_chunk
        self._chunks = first_chunk, from_chunk, chunks

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) ids, negative where there is none -> (B, T) each: the log of the head's share, and
        what the memory adds to their probability.
        """
        scoring = self._module.scoring()
        queries, chunks = self._query.queries, self._chunks
        found = point(queries, self._earlier, self._own, scoring, targets, *chunks)
        log_shares = self._module.log_shares(self._query, found)
        self._module.note_shares(log_shares, targets)
        return log_shares[:, 0], (log_shares[:, 1:].exp() * found.probability).sum(1)

    def log_probabilities(self, logits: Tensor, row: int, places: Tensor) -> Tensor:
        """The head's logits (m, V), with or without padding, of a row's tokens at places (m,),
        ascending -> log-probabilities.
        """
        chunks = places // self._module.chunk_size
        parts = []
        for chunk in chunks.unique_consecutive().tolist():
            chosen = chunks == chunk
            parts.append(self._of_chunk(logits[chosen], row, places[chosen], chunk))
        return torch.cat(parts)

    def _of_chunk(self, logits: Tensor, row: int, places: Tensor, chunk: int) -> Tensor:
        """The same for tokens of one chunk, whose number is counted from the first token's."""
        size = self._module.chunk_size
        start = chunk * size
        return mixed(
            self._module,
            Query(*(x[row : row + 1, :, places] for x in self._query)),
            places - start,
            self._earlier.row(row).cut(0, self._first_chunk * size + start),
            self._own.row(row).cut(start, start + size),
            logits.unsqueeze(0),
        ).squeeze(0)


def mixed(
    module: TokenMemory,
    query: Query,
    offsets: Tensor,
    earlier: Keys,
    own: Keys,
    logits: Tensor,
    means: Tensor | None = None,
    in_earlier: EarlierKeys | None = None,
) -> Tensor:
    """Log-probabilities of tokens of one chunk: the head's logits (B, T, V), with or without
    padding, mixed with what the keys say. Offsets, keys and what is known of them are those of
    :func:`~megaegpt.model.egpt.copy_attention.pointed_at`.
    """
    scoring = module.scoring()
    weights, ids, found = pointed_at(
        query.queries, offsets, earlier, own, scoring, means, in_earlier
    )
    log_shares = module.log_shares(query, found)  # (B, 1 + H, T)
    by_key = weights.mul_(log_shares[:, 1:].exp().unsqueeze(-1))  # (B, H, T, K)
    by_memory = torch.zeros_like(logits, dtype=by_key.dtype)
    for pointer, tokens in zip(by_key.unbind(1), _each(ids, by_key.shape[1]), strict=True):
        known = tokens.long().clamp_(min=0).unsqueeze(1)
        by_memory.scatter_add_(2, known.expand_as(pointer), pointer)
    by_head = logits.to(by_key.dtype).log_softmax(-1) + log_shares[:, 0].unsqueeze(-1)
    return torch.logaddexp(by_head, by_memory.log())
