"""Whether ``torch.compile`` works on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megaegpt.errors import first_line
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_gather_object


class Trial:
    """Tries something once a process and device; called with a device's type, it tells why it does
    not work there, or None.
    """

    def __init__(self, attempt: Callable[[str], str | None]) -> None:
        self._attempt = attempt
        self._found: dict[str, str | None] = {}
        self.__doc__ = attempt.__doc__

    def __call__(self, device_type: str) -> str | None:
        if device_type not in self._found:
            self._found[device_type] = self._attempt(device_type)
        return self._found[device_type]

    def settle(self, device_type: str, grid: ProcessGrid) -> None:
        """What fails on one rank has failed on all. Collective over all ranks.

        Blocks that are computed in another way give their gradients in another order, and ZeRO's
        buckets, which are filled in that order, would sum those of unlike parameters.
        """
        found = all_gather_object(self(device_type), grid)
        problems = [f"{p} (on rank {rank})" for rank, p in enumerate(found) if p is not None]
        if problems and grid.world_size > 1:
            self._found[device_type] = problems[0]

    def forget(self) -> None:
        """Try anew at the next call."""
        self._found.clear()


def _try_to_compile(device_type: str) -> str | None:
    """Why nothing can be compiled for a device (most often: there is no C++ compiler); else None.

    Compiles a small function to find out: seconds, once a process.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device_type))
    except Exception as error:  # whatever dynamo, inductor and the compilers beneath them raise
        return f"{type(error).__name__}: {first_line(error)}"
    return None


compile_problem = Trial(_try_to_compile)
