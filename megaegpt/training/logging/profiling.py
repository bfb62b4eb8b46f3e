"""A window of a run's steps, operator by operator: where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from megaegpt.config import LoggingConfig
from megaegpt.files import naming_failures, whole_file
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import raising_together

_ROWS = 12


class StepProfiler:
    """Profiles the window of steps that ``logging.profile`` names, on every rank.

    Each rank writes a trace for chrome://tracing or Perfetto into ``profile/`` of the run's folder;
    the operators that took longest on rank 0 are logged. A run that ends inside the window writes
    what it has.

    Args:
        config: which steps, and the run's folder.
        grid: whose rank the file is named after.
        log: shows a text on rank 0.
    """

    def __init__(
        self, config: LoggingConfig, grid: ProcessGrid, log: Callable[[str], None]
    ) -> None:
        self._window = config.profile
        self._folder = Path(config.directory) / "profile"
        self._grid = grid
        self._log = log
        self._profile: torch.profiler.profile | None = None
        self._step: torch.profiler.record_function | None = None
        self._first = self._last = 0

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._profile is not None and error is not None:
            self._profile.stop()  # this rank alone may have failed: there is nobody to wait for
        elif self._profile is not None:
            self._write()

    def enter(self, step: int) -> None:
        """Before step ``step``, counted from 1: begin to record where the window begins."""
        start, steps = self._window.start, self._window.steps
        if start is None or not start <= step < start + steps:
            return
        if self._profile is None:
            self._profile = torch.profiler.profile()
            self._profile.start()
            self._first = step
        self._step = torch.profiler.record_function(f"step {step}")  # a bar in the trace
        self._step.__enter__()

    def leave(self, step: int) -> None:
        """After step ``step``: write the trace where the window ends. Collective there."""
        if self._step is None or self._window.start is None:
            return
        self._step.__exit__(None, None, None)
        self._step, self._last = None, step
        if step == self._window.start + self._window.steps - 1:
            self._write()

    def _write(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        if self._grid.device.type == "cuda":
            torch.cuda.synchronize(self._grid.device)
        profile.stop()
        name = f"steps_{self._first}-{self._last}_rank{self._grid.rank}.json"
        path = self._folder / name
        with raising_together(self._grid), naming_failures(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                profile.export_chrome_trace(str(temporary))
        on_gpu = self._grid.device.type == "cuda"
        key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=_ROWS, max_name_column_width=50)
        self._log(f"profile of steps {self._first} to {self._last}: {path}\n{table}")
