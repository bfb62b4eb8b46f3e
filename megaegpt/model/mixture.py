"""A distribution over the next token that is mixed with the head's."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Mixture(Protocol):
    """Of B rows of T tokens."""

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) ids, negative where there is none -> (B, T) each, in at least fp32: the log of the
        head's share, and what is added to their probability.
        """
        ...

    def log_probabilities(self, logits: Tensor, row: int, places: Tensor) -> Tensor:
        """The head's logits (m, V), with or without padding, of a row's tokens at places (m,),
        ascending -> log-probabilities.
        """
        ...
