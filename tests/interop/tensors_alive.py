"""How many of a model's tensors are in memory at a time, while files of it are read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megaegpt.config import ModelConfig
from megaegpt.interop.export import Read, open_ours
from megaegpt.interop.tensor_files import StoredTensor


class TensorsAlive:
    """Stands between a program and the tensors that it reads."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        """At each reading, with the tensor just read."""
        self._there: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def _noted(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.clone()
        self._there.add(tensor)
        self.counts.append(len(self._there))
        return tensor

    def opening(
        self, function: Callable[..., dict[str, StoredTensor]]
    ) -> Callable[..., dict[str, StoredTensor]]:
        """``function``, which opens a model's files, with its tensors counted."""

        def read(stored: StoredTensor) -> Tensor | None:
            return self._noted(stored.read())

        def opened(*args: Any) -> dict[str, StoredTensor]:
            return {
                name: dataclasses.replace(stored, read=functools.partial(read, stored))
                for name, stored in function(*args).items()
            }

        return opened

    @contextlib.contextmanager
    def open_ours(self, weights: Path, config: ModelConfig) -> Iterator[Read]:
        """As the function of that name, with its tensors counted."""
        with open_ours(weights, config) as read:
            yield lambda name: self._noted(read(name))
