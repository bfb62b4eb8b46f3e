"""Copies of a run's state in host memory, from which files are written while training goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class HostCopies:
    """Copies everything that one checkpoint is written from.

    An object is copied once, however often it is met, and a storage once, however many tensors look
    into it: files written from the copies are, byte for byte, those of the originals.
    """

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        """Copies by the address of their originals, as ``copy.deepcopy`` notes them."""
        self._storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
        self._originals: list[Any] = []
        """Keeps their addresses from being given to others."""

    def of(self, value: Any) -> Any:
        """Copy tensors, and containers and other objects with all that they hold."""
        if id(value) in self._objects:
            return self._objects[id(value)]
        if isinstance(value, Tensor):
            copied: Any = self._tensor(value)
        elif isinstance(value, dict):
            copied = copy.copy(value)  # of its class, and with attributes such as ``_metadata``
            for key, item in value.items():
                copied[key] = self.of(item)
        elif type(value) in (list, tuple):
            copied = type(value)(self.of(item) for item in value)
        else:
            return copy.deepcopy(value, self._objects)
        self._objects[id(value)] = copied
        self._originals.append(value)
        return copied

    def release(self) -> None:
        """Let the originals go; to be called when all is copied."""
        self._objects.clear()
        self._storages.clear()
        self._originals.clear()

    @torch.no_grad()
    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = self._storage(tensor.untyped_storage())
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(view, requires_grad=tensor.requires_grad)
        return view.requires_grad_(tensor.requires_grad)

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        key = (storage.device, storage.data_ptr())
        if storage.nbytes() == 0 or key not in self._storages:
            contents = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self._storages[key] = contents.to("cpu", copy=True).untyped_storage()
            self._originals.append(storage)
        return self._storages[key]
