"""Bytes held by tensors: what is live, and the most that ever was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMeter(TorchDispatchMode):
    """Counts the storages that torch's operators create inside this context.

    It works for tensors with memory and for torch's fake ones, which makes a program's peak known
    without running it. Meta tensors, scratch space inside operators and what an allocator adds are
    not counted.

    Example:
        >>> with TensorMeter() as meter:
        ...     x = torch.zeros(1000)
        ...     y = x + 1
        ...     del y
        >>> meter.live, meter.peak
        (4000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes now."""
        self.peak = 0
        """Most bytes since the start or the last :meth:`reset_peak`."""
        self._known: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, then count what it returned."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # torch keeps one object a storage, for as long as the storage lives
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
