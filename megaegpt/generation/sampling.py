"""From logits to the next token: greedy, temperature, top-k, top-p.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaegpt.config import GenerationConfig, RunConfig
from megaegpt.config.validation import validate
from megaegpt.errors import ConfigError, NotFiniteError

_SEEDS = range(2**64)
"""Seeds that torch's generators take and a configuration may have."""

NO_TOKEN = -1
"""In place of an id where the model has computed no numbers."""


def check_sampling(config: GenerationConfig, seeds: Sequence[int]) -> None:
    """The ranges that a configuration file is held to, for values from anywhere.

    Raises:
        ConfigError: one line that names each value out of range.
    """
    validate(RunConfig(generation=config))
    for seed in (seeds[0], seeds[-1]) if isinstance(seeds, range) and seeds else seeds:
        if seed not in _SEEDS:
            raise ConfigError(f"seed {seed} of a text must not be negative, and be below 2^64")


def check_drawn(ids: Sequence[int]) -> None:
    """Refuse to go on from what a :class:`Sampler` could not draw.

    Raises:
        NotFiniteError: an id is :data:`NO_TOKEN`.
    """
    if NO_TOKEN in ids:
        raise NotFiniteError(
            "the model's logits are not finite, and so there is no next token: its weights "
            "have diverged, or the numbers are too large for the precision (fp16 ends at "
            "65504: use bf16 or fp32)"
        )


class Sampler:
    """Draws one token a row.

    Every row has random numbers of its own, from its own seed: what it becomes depends neither on
    the rows beside it nor on torch's global generators, and tensor-parallel ranks, which hold the
    same logits, draw the same tokens.

    Args:
        config: temperature, top_k and top_p; its seed is not read.
        seeds: one a row.
        device: of the logits.
    """

    def __init__(
        self, config: GenerationConfig, seeds: Sequence[int], device: torch.device
    ) -> None:
        self._config = config
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(self, logits: Tensor) -> Tensor:
        """(B, V) logits, the same on all tensor-parallel ranks -> (B,) ids, :data:`NO_TOKEN` where
        they are no probabilities
        """
        # Whether the largest is a number says it of all: what is not one passes through amax.
        return self._drawn(logits).where(logits.amax(-1).isfinite(), NO_TOKEN)

    def _drawn(self, logits: Tensor) -> Tensor:
        if self._config.temperature == 0:
            return logits.argmax(-1)
        probabilities, ids = candidates(logits, self._config)
        # The least of exponential variables with rates p is each with probability p: a draw
        # without the synchronisation of torch.multinomial, and from one generator a row.
        noise = torch.empty_like(probabilities)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        drawn = (probabilities / noise).argmax(-1, keepdim=True)  # (B, 1)
        return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def candidates(logits: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn, at a temperature above 0.

    Temperature first, then the ``top_k`` likeliest (Fan et al., arXiv 1805.04833), then the fewest
    of those that hold ``top_p`` of their probability (Holtzman et al., arXiv 1904.09751).

    Returns:
        fp32 probabilities (B, K) up to a factor a row, 0 for what is cut; and their ids (B, K), or
        None where K is the vocabulary in its order.
    """
    logits = logits.float()
    # The largest becomes 0 before the division, so that a tiny temperature does not overflow; one
    # that fp32 has no normal number for would make it 0 / 0.
    temperature = max(config.temperature, torch.finfo(torch.float32).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    if config.top_k is None and top_p == 1:
        return logits.softmax(-1), None
    count = logits.shape[-1] if config.top_k is None else min(config.top_k, logits.shape[-1])
    logits, ids = logits.topk(count, dim=-1)  # likeliest first
    probabilities = logits.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # held by the likelier ones
        # The first is always kept, also where rounding makes `before` tiny but not 0.
        cut = before >= top_p
        cut[..., 0] = False
        probabilities = probabilities.masked_fill(cut, 0.0)
    return probabilities, ids
