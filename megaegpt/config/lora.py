"""Low-rank adapters: what of a model is trained beside its frozen weights."""

from __future__ import annotations

from dataclasses import dataclass

from megaegpt.config.ranges import Fraction, PositiveFloat, PositiveInt

TARGET_GROUPS = {
    "attention": ("query_latent", "query", "latent", "rope_key", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
}
"""Layers of a block that can have an adapter, by the part of the block that they are in."""


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters of low rank beside a frozen model (Hu et al., arXiv 2106.09685)."""

    rank: PositiveInt | None = None
    """Width of an adapter: ``weight + alpha / rank * b @ a``, where b has so many columns and a so
    many rows. null: there are none, and the weights themselves are trained."""
    alpha: PositiveFloat = 16.0
    """Weight of the adapters, divided by the rank."""
    dropout: Fraction = 0.0
    """Probability that an input of an adapter is dropped."""
    targets: tuple[str, ...] = ("attention", "mlp")
    """Layers of each block that have one: attention and mlp, or by name query, key, value, output,
    gate, up, down (of latent attention also query_latent, latent, rope_key)."""

    @property
    def scale(self) -> float:
        """What a product of the factors is multiplied by."""
        return self.alpha / (self.rank or 1)

    @property
    def layers(self) -> frozenset[str]:
        """Names of layers that the targets stand for, whether or not a model has them."""
        return frozenset(
            layer for target in self.targets for layer in TARGET_GROUPS.get(target, (target,))
        )


def target_problem(target: str) -> str | None:
    """Describe the mistake in an entry of ``targets``; None: there is none."""
    layers = [layer for group in TARGET_GROUPS.values() for layer in group]
    if target in TARGET_GROUPS or target in layers:
        return None
    return f"{target!r} is none of {', '.join([*TARGET_GROUPS, *layers])}"
