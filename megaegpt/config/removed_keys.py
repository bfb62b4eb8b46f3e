"""Keys of earlier versions that are no more, still written in old run files and checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple


class _RemovedKey(NamedTuple):
    unused: Any
    """The value with which it did nothing; a file that holds it is read as before."""
    instead: str
    """What to do where it did something, as the end of a sentence."""


_LITTLE = "it changed no loss by more than some 0.01 nats"
_TRAINED_ANEW = f"{_LITTLE}; such a model is trained anew without it"

_REMOVED = {
    "model.egpt.token_counts": _RemovedKey(
        False, "model.egpt.token_memory took its place and gains more; such a model is trained anew"
    ),
    "model.egpt.features_per_chunk": _RemovedKey(1, _TRAINED_ANEW),
    "model.egpt.feature_pooling": _RemovedKey("last", _TRAINED_ANEW),
    "model.egpt.random_history": _RemovedKey(
        False, f"{_LITTLE}, and a run goes on without it; leave it out"
    ),
    "model.egpt.adapter_norm": _RemovedKey(False, _TRAINED_ANEW),
}


def is_unused(dotted: str, value: Any) -> bool:
    """Whether a key, as the run's configuration or its section ``model`` names it, was removed and
    had no effect.
    """
    removed = _find(dotted)
    return removed is not None and removed.unused == value


def removal(dotted: str) -> str | None:
    """A sentence about a key that was removed; None: it never was one."""
    removed = _find(dotted)
    return removed and f"{dotted} is a key of earlier versions: {removed.instead}"


def _find(dotted: str) -> _RemovedKey | None:
    """The section ``model`` also stands by itself, in a weights folder."""
    return _REMOVED.get(dotted) or _REMOVED.get(f"model.{dotted}")
