"""The values that a number may have, as metadata of its field: ``steps: PositiveInt``.

Every number of a configuration has a range, so none reaches a program unchecked. A field whose
value is None has its default and is in range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

from megaegpt.config.metadata import leaves, metadata
from megaegpt.config.parsing import Problem


@dataclass(frozen=True)
class Range:
    """The finite numbers between two ends."""

    rule: str
    """Words for a number below the range (and above it, unless ``ceiling``), as in an error."""
    low: float
    high: float = math.inf
    low_included: bool = True
    high_included: bool = True
    ceiling: bool = False
    """The upper end is a mere technical limit, and is said only where it is exceeded."""

    def violation(self, value: float) -> str | None:
        """Which rule ``value`` breaks, as words that follow it; None if it is in range."""
        if not math.isfinite(value):
            return "must be finite"
        if value < self.low or (value == self.low and not self.low_included):
            return self.rule
        if value > self.high or (value == self.high and not self.high_included):
            return f"must be at most {self.high}" if self.ceiling else self.rule
        return None


_INT64 = 2**63 - 1
_INT32 = 2**31 - 1

PositiveInt = Annotated[int, Range("must be greater than 0", 1, _INT64, ceiling=True)]
NonNegativeInt = Annotated[int, Range("must not be negative", 0, _INT64, ceiling=True)]
TensorSize = Annotated[int, Range("must be greater than 0", 1, _INT32, ceiling=True)]
"""A dimension of a tensor."""
BatchSize = Annotated[int, Range("must be greater than 0", 1, 2**24, ceiling=True)]
"""Samples; an index of each of a step's is kept in memory."""
LayerCount = Annotated[int, Range("must be greater than 0", 1, 10_000, ceiling=True)]
"""Layers; ten times as many as any published model has, which is also what can be built at all."""
SampleLength = Annotated[int, Range("must not be negative", 0, 1_000_000, ceiling=True)]
"""Tokens of a text that a run writes while it trains."""
StepWindow = Annotated[int, Range("must be greater than 0", 1, 10_000, ceiling=True)]
"""Steps of which numbers are kept, in memory and in checkpoints."""
TokenId = Annotated[int, Range("must not be negative", 0, _INT32, ceiling=True)]
Seed = Annotated[int, Range("must not be negative", 0, _INT64, ceiling=True)]
"""A seed; torch's generators take 64 bits, so seeds can be counted up from it, text by text."""
PositiveFloat = Annotated[float, Range("must be greater than 0", 0, low_included=False)]
NonNegativeFloat = Annotated[float, Range("must not be negative", 0)]
ScaleFactor = Annotated[float, Range("must be at least 1", 1)]
Fraction = Annotated[float, Range("must be at least 0 and below 1", 0, 1, high_included=False)]
"""A share of which something must be left."""
Probability = Annotated[float, Range("must be above 0, at most 1", 0, 1, low_included=False)]


def range_problems(section: Any, prefix: str = "") -> Iterator[Problem]:
    """The numbers of a configuration, or of one section, that are out of range.

    Args:
        section: an instance of a configuration's dataclass.
        prefix: its dotted key with the final dot; empty for a whole configuration.
    """
    for dotted, annotation, value in leaves(section, prefix):
        if isinstance(value, tuple):
            for number, item in enumerate(value):
                if is_dataclass(item):
                    yield from range_problems(item, f"{dotted}[{number}].")
        allowed = metadata(annotation, Range)
        if allowed is None or value is None or isinstance(value, str):  # a word for a number
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        rules = [rule for number in numbers if (rule := allowed.violation(number)) is not None]
        if rules:
            shown = list(value) if isinstance(value, tuple) else value
            yield Problem((dotted,), f"{dotted}={shown} {rules[0]}")
