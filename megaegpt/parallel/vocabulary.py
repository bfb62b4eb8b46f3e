"""Whether ids are tokens of the model: asked where they enter it, at the embedding and the loss.

Unasked, an id beyond the vocabulary would be looked up in the rows that pad it, or on no
tensor-parallel rank at all, and a target beyond it would count as improbable: training would go on
with wrong numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaegpt.errors import DataError
from megaegpt.labels import IGNORE

_REMEDY = "was the text encoded with another tokenizer, or is model.vocab_size too small?"


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse ids below 0 or from ``vocab_size`` on.

    On a GPU nothing waits for the answer: the device stops the program with an assertion.

    Raises:
        DataError: on the CPU; names the id.
    """
    if not _skipped(tokens):
        _check(tokens, vocab_size, f"token id {{}} is not one of the model's {vocab_size} tokens")


def check_targets(targets: Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Refuse targets that are not one for each place of ``shape``, and, as :func:`check_tokens`
    does, those that are neither a token nor ``IGNORE``.

    Raises:
        DataError: the shape differs; on the CPU also a target, which it names.
    """
    if targets.shape != shape:
        raise DataError(
            f"targets of shape {tuple(targets.shape)} for tokens of shape {tuple(shape)}: "
            "each token needs one"
        )
    if not _skipped(targets):
        _check(
            targets.masked_fill(targets == IGNORE, 0),
            vocab_size,
            f"target {{}} is neither one of the model's {vocab_size} tokens nor {IGNORE} "
            "(not predicted)",
        )


def _skipped(ids: Tensor) -> bool:
    """Whether there are no values to look at: in an empty, a meta or a fake tensor, or while a
    graph is compiled.
    """
    return (
        torch.compiler.is_compiling() or type(ids) is not Tensor or ids.is_meta or not ids.numel()
    )


def _check(ids: Tensor, vocab_size: int, problem: str) -> None:
    if ids.device.type != "cpu":
        if hasattr(torch, "_assert_async"):
            fine = ((ids >= 0) & (ids < vocab_size)).all()
            torch._assert_async(fine, f"{problem.format('of the batch')}: {_REMEDY}")
        return
    lowest, highest = (int(x) for x in torch.aminmax(ids))
    if lowest < 0 or highest >= vocab_size:
        raise DataError(f"{problem.format(lowest if lowest < 0 else highest)}: {_REMEDY}")
