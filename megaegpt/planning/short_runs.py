"""Runs of few blocks, from whose micro-steps that of a run with any number of blocks follows.

Alike are blocks with the same window that are trained, or frozen below all that are trained
(through which gradients may not go), or frozen above one. What such a block takes is what a
micro-step takes more with one more of them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megaegpt.config import RunConfig
from megaegpt.config.freezing import parse_part
from megaegpt.model.attention.layer import layer_window


@dataclass(frozen=True)
class ShortRun:
    """One whose micro-step is played through."""

    config: RunConfig
    whole: int
    """How many times it is added for the run's micro-step; subtracted, where it is negative."""
    blocks: int
    """The same for what the run's blocks take of it."""

    @property
    def outside(self) -> int:
        """The same for all but its blocks."""
        return self.whole - self.blocks


@dataclass(frozen=True)
class _Kind:
    """What decides, beside the configuration, on what a block takes."""

    window: int | None
    is_frozen: bool
    is_above_trained: bool
    """Of frozen ones."""


def short_runs(config: RunConfig) -> list[ShortRun]:
    """Two with one and two blocks where all are alike; otherwise the run itself, and two for each
    kind of blocks.
    """
    kinds = Counter(_kinds(config))
    if len(kinds) == 1:
        kind, count = kinds.popitem()
        few, more = _pair(config, kind)
        return [ShortRun(few, 2 - count, -count), ShortRun(more, count - 1, count)]
    runs = [ShortRun(config, 1, 0)]
    for kind, count in kinds.items():
        few, more = _pair(config, kind)
        runs += [ShortRun(few, 0, -count), ShortRun(more, 0, count)]
    return runs


def _kinds(config: RunConfig) -> Iterator[_Kind]:
    """Each block's."""
    is_above_trained = False
    for layer, is_frozen in enumerate(_frozen_layers(config)):
        is_above_trained |= not is_frozen
        yield _Kind(layer_window(config.model, layer), is_frozen, is_frozen and is_above_trained)


def _frozen_layers(config: RunConfig) -> list[bool]:
    parts = {part for text in config.training.freeze for part in parse_part(text)}
    return [f"layers:{layer}" in parts for layer in range(config.model.num_layers)]


def _pair(config: RunConfig, kind: _Kind) -> tuple[RunConfig, RunConfig]:
    """Two runs, the second with one more block of a kind, between gradients as it has them."""
    if kind.is_above_trained:
        few, more = [False, True], [False, True, True]
    else:
        above = [False] if kind.is_frozen and not all(_frozen_layers(config)) else []
        few, more = [kind.is_frozen, *above], [kind.is_frozen, kind.is_frozen, *above]
    return _with_blocks(config, kind.window, few), _with_blocks(config, kind.window, more)


def _with_blocks(config: RunConfig, window: int | None, frozen: Sequence[bool]) -> RunConfig:
    """The run with other blocks, for each of which ``frozen`` says whether it is."""
    model = dataclasses.replace(
        config.model, num_layers=len(frozen), window=window, window_every=None
    )
    parts = [text for text in config.training.freeze if not text.startswith("layers:")]
    parts += [f"layers:{layer}" for layer, is_frozen in enumerate(frozen) if is_frozen]
    training = dataclasses.replace(config.training, freeze=tuple(parts))
    return dataclasses.replace(config, model=model, training=training)
