"""The base class of every kind of model, and its predictions."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from megaegpt.config import ModelConfig
from megaegpt.model.block import BlockStack
from megaegpt.model.head import OutputHead
from megaegpt.model.mixture import Mixture
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import count_parameters

_ROWS_OF_LOGITS = 256


class Predictions(NamedTuple):
    """The next-token distributions of a model after every token of a batch.

    Shapes: B rows, T tokens of a row (over any number of dimensions), C hidden, V vocabulary.
    """

    head: OutputHead
    hidden: Tensor
    """(B, T..., C), the input of the head."""
    mixture: Mixture | None = None
    """A distribution that is mixed into the head's."""

    def logits(self, chosen: Tensor) -> Iterator[Tensor]:
        """The logits behind some of the tokens, some hundred at a time.

        Args:
            chosen: (B, T...) bool.

        Yields:
            (m, V), in the order in which ``hidden[chosen]`` has them; log-probabilities where there
            is a mixture. Collective over the tensor-parallel group.
        """
        if self.mixture is None:
            for hidden in self.hidden[chosen].split(_ROWS_OF_LOGITS):
                yield self.head.full_logits(hidden)
            return
        rows = zip(self.hidden.flatten(1, -2), chosen.flatten(1), strict=True)
        for row, (hidden, mask) in enumerate(rows):  # each row has a mixture of its own
            for places in mask.nonzero()[:, 0].split(_ROWS_OF_LOGITS):
                logits = self.head.full_logits(hidden[places])
                yield self.mixture.log_probabilities(logits, row, places)


class LanguageModel(nn.Module, abc.ABC):
    """A stack of blocks under a head; what is below the stack tells the kinds apart."""

    config: ModelConfig
    grid: ProcessGrid
    stack: BlockStack
    head: OutputHead

    @abc.abstractmethod
    def predictions(self, **arguments: Tensor) -> Predictions:
        """Called as the model is (:mod:`megaegpt.model.calling`), but without targets."""

    @abc.abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token of a full sample, forward and
        backward, without a frozen encoder.
        """

    def num_parameters(self) -> int:
        """Parameters over all TP ranks, a tied head once, padding rows included; those of a frozen
        encoder are not among them.
        """
        return count_parameters(self)

    def drops(self) -> bool:
        """Whether blocks or adapters draw numbers in training."""
        return any(getattr(part, "dropout", 0.0) for part in self.modules())

    def metrics(self) -> dict[str, float]:
        """Measure quantities of the model itself, which an evaluation reports by name. Collective
        over all ranks of a tensor-parallel group.
        """
        return {}
