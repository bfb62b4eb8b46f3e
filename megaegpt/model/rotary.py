"""Rotary positions (Su et al., arXiv 2104.09864) and their scaling to longer texts.

Shapes: B batch, T tokens, H heads, D head dim, R rotated columns of a head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megaegpt.config import ModelConfig, RopeScalingConfig


class RotaryTable:
    """Cosines and sines for one set of tokens, which all layers share.

    Args:
        positions: (T,) or (B, T).
        frequencies: (R / 2,) in fp64, from :func:`rotary_frequencies`.
        dtype: of what is rotated; the table, and what is computed, is in at least fp32.
        pairs: the columns rotated together: i and i + R/2, or 2i and 2i + 1.
        factor: on what is rotated.
    """

    def __init__(
        self,
        positions: Tensor,
        frequencies: Tensor,
        dtype: torch.dtype,
        *,
        pairs: Literal["halves", "interleaved"] = "halves",
        factor: float = 1.0,
    ) -> None:
        self._pairs = pairs
        self._size = 2 * len(frequencies)
        angles = positions.to(torch.float64).unsqueeze(-1) * frequencies  # (..., T, R / 2)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        precise = torch.promote_types(dtype, torch.float32)
        self._cos, self._sin = cos.to(precise), sin.to(precise)
        if positions.dim() == 2:  # a heads' dimension to broadcast over: (B, 1, T, R / 2)
            self._cos, self._sin = self._cos.unsqueeze(1), self._sin.unsqueeze(1)

    def rotate(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> the same, with its first R columns rotated."""
        if x.shape[-1] == self._size:
            return self._rotate(x)
        rotated, rest = x.split([self._size, x.shape[-1] - self._size], dim=-1)
        return torch.cat([self._rotate(rotated), rest], dim=-1)

    def _rotate(self, x: Tensor) -> Tensor:
        """(B, H, T, R) -> (B, H, T, R)"""
        cos, sin = self._cos, self._sin
        precise = x.to(cos.dtype)
        if self._pairs == "halves":
            first, second = precise.chunk(2, dim=-1)
        else:
            first, second = precise.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        if self._pairs == "halves":
            return torch.cat(rotated, dim=-1).to(x.dtype)
        return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)


def rotary_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> RotaryTable | None:
    """The table for tokens at ``positions``, whose states are of ``dtype``; None unless positions
    are rotary.
    """
    if config.positions != "rotary":
        return None
    frequencies = rotary_frequencies(config, positions.device)
    factor = rotary_factor(config.rope_scaling)
    return RotaryTable(positions, frequencies, dtype, pairs=config.rope_pairs, factor=factor)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """(R / 2,) radians that each pair of columns turns from one token to the next, in fp64."""
    scaling, size, base = config.rope_scaling, config.rope_size, config.rope_base
    if scaling.kind == "ntk":  # the slowest pair turns ``factor`` times more slowly
        base *= scaling.factor ** (size / max(size - 2, 1))
    frequencies = base ** (-torch.arange(0, size, 2, device=device, dtype=torch.float64) / size)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind in ("none", "ntk"):
        return frequencies
    original = config.rope_original_length
    assert original is not None
    if scaling.kind == "llama3":
        kept = _kept_by_llama3(frequencies, scaling, original)
    else:
        kept = _kept_by_yarn(len(frequencies), scaling, base, original, device)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_factor(scaling: RopeScalingConfig) -> float:
    """On rotated queries and keys alike (YaRN, arXiv 2309.00071, section 3.4); 1 for others."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def _kept_by_llama3(frequencies: Tensor, scaling: RopeScalingConfig, original: float) -> Tensor:
    """(R / 2,) share of each frequency that is not divided: a ramp over the turns that it makes in
    the original length (Llama 3.1's reference code).
    """
    turns = original * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(
    pairs: int, scaling: RopeScalingConfig, base: float, original: float, device: torch.device
) -> Tensor:
    """(R / 2,) share of each frequency that is not divided: a ramp over the pairs' numbers between
    those that make ``beta_fast`` and ``beta_slow`` turns in the original length (YaRN, section 3.2,
    with the whole numbers of its reference code).
    """

    def pair_of(turns: float) -> float:
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair_of(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_of(scaling.beta_slow)), 2 * pairs - 1)
    numbers = torch.arange(pairs, device=device, dtype=torch.float64)
    return 1 - ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
