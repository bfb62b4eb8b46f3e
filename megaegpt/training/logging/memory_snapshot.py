"""What lay in a GPU's memory when it was not enough, and who put it there."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from megaegpt.config import LoggingConfig
from megaegpt.files import whole_file, write_whole
from megaegpt.parallel.grid import ProcessGrid

_MOST_EVENTS = 100_000
"""Allocations and releases that are kept, the last ones: a step and more of any model."""


class MemorySnapshot:
    """Torch's own account of this rank's GPU, in files of the run's folder; nothing on a CPU.

    With ``logging.memory_snapshot`` it has the allocations with the lines of Python that made them,
    from :meth:`start` on, in the form that PyTorch's viewer reads.
    """

    def __init__(self, config: LoggingConfig, grid: ProcessGrid) -> None:
        self._folder = Path(config.directory)
        self._grid = grid
        self._on_gpu = grid.device.type == "cuda"
        self._is_recorded = self._on_gpu and config.memory_snapshot

    def start(self) -> None:
        """Record allocations from now on, which takes microseconds for each."""
        if self._is_recorded:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS, stacks="python")

    def stop(self) -> None:
        """Forget what was recorded."""
        if self._is_recorded:
            torch.cuda.memory._record_memory_history(enabled=None)

    def write(self) -> list[str]:
        """Write what there is, and say where, a line for each file. What cannot be written is left
        out: the reason of the run's end must not be hidden.
        """
        lines: list[str] = []
        if not self._on_gpu:
            return lines
        path = self._folder / f"memory_rank{self._grid.rank}.txt"
        with contextlib.suppress(OSError, RuntimeError):
            write_whole(path, torch.cuda.memory_summary(self._grid.device).encode())
            lines.append(f"  what lay in memory: {path}")
        if self._is_recorded:
            path = path.with_suffix(".pickle")
            with contextlib.suppress(OSError, RuntimeError):
                with whole_file(path) as temporary:
                    torch.cuda.memory._dump_snapshot(str(temporary))
                lines.append(
                    f"  which lines of the program put it there: {path}, to be dropped on "
                    "https://docs.pytorch.org/memory_viz, or made a page by: python -m "
                    f"torch.cuda._memory_viz trace_plot {path} -o memory.html"
                )
        return lines
