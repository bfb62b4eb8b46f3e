"""Numbers that stand in the place of a token or of a text, for data and models alike."""

from __future__ import annotations

IGNORE = -100
"""Target of a position that is not predicted, as torch's losses have it."""

NOTHING_BEFORE = -1
"""In the place of tokens before a chunk: it is the first of its text."""

PADDING = -1
"""Segment of padding: any negative one is seen by nothing (see :mod:`megaegpt.model.segments`)."""
