"""What a run has drawn of its data, over all its ``--resume``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaegpt.config import BatchSchedule


@dataclass(frozen=True)
class Consumption:
    """Samples and tokens drawn before each step to come.

    Checkpoints keep both: a run that goes on with another batch, ramp or context length would not
    find them by its own schedule.
    """

    batches: BatchSchedule
    """Its sample numbers are those of the data."""
    tokens_per_sample: float
    """Predicted ones, padding not counted; their mean, where samples differ."""
    other_tokens: float = 0
    """Those drawn besides so many of each sample before, of samples that had more or fewer."""

    @classmethod
    def restored(
        cls, batches: BatchSchedule, tokens_per_sample: float, state: Mapping[str, Any]
    ) -> Consumption:
        """That of a run which goes on, with the next sample that was not drawn.

        Where samples have another length, the data is cut and shuffled anew, and no sample number
        leaves out just what was drawn: the run goes on behind as many tokens, so that its epochs
        are as long as they were.

        Args:
            batches: of the configuration.
            state: the loop's, from a checkpoint; without :meth:`state`'s entries (a new run, or a
                checkpoint of an earlier version) all steps are taken to be as in ``batches``.
        """
        if "samples" not in state:
            return cls(batches, tokens_per_sample)
        sample = state["samples"]
        if state["tokens_per_sample"] != tokens_per_sample:
            sample = math.ceil(state["tokens"] / tokens_per_sample)
        return cls(
            batches.going_on(state["step"], sample),
            tokens_per_sample,
            state["tokens"] - sample * tokens_per_sample,
        )

    def tokens(self, step: int) -> int:
        """Tokens drawn in the first ``step`` steps together."""
        return round(self._tokens(step))

    def _tokens(self, step: int) -> float:
        return self.batches.samples_before(step) * self.tokens_per_sample + self.other_tokens

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` steps keeps of it."""
        return {
            "samples": self.batches.samples_before(step),
            "tokens": self._tokens(step),
            "tokens_per_sample": self.tokens_per_sample,
        }

    def notices(self, state: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
        """Where in the data a resumed run goes on, if it is not where its schedule would have it.

        Args:
            state: as for :meth:`restored`.
            identity: the run's own (:func:`~megaegpt.training.identity.run_identity`).
        """
        if "samples" not in state:
            return []
        sample = self.batches.samples_before(state["step"])
        before, now = state["tokens_per_sample"], self.tokens_per_sample
        if before != now:
            return [
                f"samples have {_number(now)} tokens, where they had {_number(before)}, and are "
                "cut and shuffled anew: the data goes on behind as many tokens as were seen, at "
                f"sample {sample:,}; of this epoch's rest some are seen again, and others not"
            ]
        if all(state.get(key) == identity[key] for key in ("global_batch_size", "batch_ramp")):
            return []
        return [f"the data goes on behind the {sample:,} samples that were drawn"]


def _number(tokens: float) -> str:
    return f"{tokens:,.2f}".removesuffix(".00")
