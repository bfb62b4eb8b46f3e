"""The learning rate as a pure function of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math

from megaegpt.config.training import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0) in a run of ``total_steps``.

    Warm-up rises linearly and reaches ``lr`` on step ``warmup_steps``; step 0 already learns a
    little. After it, ``cosine`` and ``linear`` fall to ``min_lr`` at step ``decay_steps`` (None:
    ``total_steps``) and stay there; ``wsd`` is constant until its last ``decay_steps`` steps (None:
    a fifth of the run), in which it falls linearly to ``min_lr``; ``constant`` stays at ``lr``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        length = max(1, total_steps // 5) if config.decay_steps is None else config.decay_steps
        start, end = max(config.warmup_steps, total_steps - length), total_steps
    else:
        start = config.warmup_steps
        end = total_steps if config.decay_steps is None else config.decay_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if config.schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        remaining = 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * remaining
