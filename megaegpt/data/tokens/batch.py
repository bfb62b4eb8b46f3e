"""The one form in which samples travel: arrays or tensors by name, already shifted.

======== ================ ===================================================================
name     shape            what
======== ================ ===================================================================
tokens   (n, T) int64     what is read
targets  (n, T) int64     the token after each; -100 where nothing is predicted
segments (n, T) int64     of packed texts: the number of each token's text, negative at padding
chunk_ids (n, N) int64    of windows of chunks: each chunk's number in its stream
before   (n, O) int64     of windows of chunks, where the model is told of them: the tokens before
                          the window; -1 where its text begins
======== ================ ===================================================================

The last three are there for samples that have them. What is read of a feature store joins them by
the names of :mod:`megaegpt.model.calling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from megaegpt.labels import IGNORE

if TYPE_CHECKING:  # drawing samples needs no torch
    from torch import Tensor

Arrays = dict[str, np.ndarray]
"""Samples, contiguous."""

Batch: TypeAlias = "Mapping[str, Tensor]"
"""A micro-batch, on any device."""


def shifted(rows: np.ndarray, document_end: int | None = None) -> Arrays:
    """Rows of T + 1 consecutive tokens, of any integer type -> ``tokens``, ``targets``, (n, T).

    Args:
        document_end: token after which nothing is predicted, see :func:`mask_after`.
    """
    tokens = rows[:, :-1].astype(np.int64, order="C")
    targets = rows[:, 1:].astype(np.int64, order="C")
    mask_after(document_end, tokens, targets)
    return {"tokens": tokens, "targets": targets}


def mask_after(document_end: int | None, tokens: np.ndarray, targets: np.ndarray) -> None:
    """Leave out, in place, the targets that follow a document's end: a document's first token does
    not follow from the one before it. Megatron-LM's ``eod_mask_loss`` masks the same positions.

    Args:
        document_end: the token that ends a document; None: nothing is left out.
        tokens: what is read, of any shape.
        targets: of the same shape; -100 where nothing is predicted.
    """
    if document_end is not None:
        targets[tokens == document_end] = IGNORE
