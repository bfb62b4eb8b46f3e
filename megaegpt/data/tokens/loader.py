"""Global batches, prepared ahead by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from megaegpt.config.batch import BatchSchedule
from megaegpt.data.tokens.samples import Samples

if TYPE_CHECKING:
    from megaegpt.parallel.grid import ProcessGrid

MicroBatch = torch.Tensor | tuple[torch.Tensor, ...]
"""What ``samples.batch`` returns, as tensors on the CPU (pinned where the model is on a GPU)."""


class TrainingLoader:
    """Iterate over optimizer steps; each gives this rank's micro-batches as a list.

    A step has the samples that follow those of the steps before; micro-step m of data-parallel
    rank r takes the ``micro_batch_size`` of them from ``(m * dp_size + r) * micro_batch_size`` on.
    So a step sees the same samples whatever the number of ranks, and any step can be the first.

    The iteration has no end; use the loader as a context manager, or close it.

    Args:
        samples: :class:`PretrainingSamples`, :class:`ChunkWindows`, or a blend of them.
        grid: this process's place; ``dp_rank``, ``dp_size`` and ``device`` are used.
        global_batch_size: samples a step, one number or how they grow; multiples of
            ``micro_batch_size * grid.dp_size``.
        micro_batch_size: samples a micro-batch.
        start_step: first step to give, for resuming.
        prefetch: steps prepared ahead.
    """

    def __init__(
        self,
        samples: Samples,
        grid: ProcessGrid,
        global_batch_size: int | BatchSchedule,
        micro_batch_size: int,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        batches = (
            BatchSchedule(global_batch_size)
            if isinstance(global_batch_size, int)
            else global_batch_size
        )
        per_micro_step = micro_batch_size * grid.dp_size
        for size in batches.sizes():
            if size % per_micro_step:
                raise ValueError(f"{size} samples are not whole steps of {per_micro_step}")
        self._samples = samples
        self._batches = batches
        self._micro_batch_size = micro_batch_size
        self._pinned = grid.device.type == "cuda"
        micro_steps = np.arange(batches.final // per_micro_step)
        first = (micro_steps * grid.dp_size + grid.dp_rank) * micro_batch_size
        self._rows = (first[:, None] + np.arange(micro_batch_size)).ravel()  # ascending
        self._ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(max(1, prefetch))
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._prepare, args=(start_step,), name="training-loader", daemon=True
        )
        self._thread.start()

    def _prepare(self, step: int) -> None:
        """The background thread: batches in order until told to stop; an error is passed on."""
        try:
            while not self._stopping.is_set():
                self._ready.put(self._batch_of(step))
                step += 1
        except BaseException as error:
            self._ready.put(error)

    def _batch_of(self, step: int) -> list[MicroBatch]:
        rows = self._rows[: np.searchsorted(self._rows, self._batches.size(step))]
        numbers = self._batches.samples_before(step) + rows
        buffer = torch.empty(
            (len(numbers), self._samples.row_len), dtype=torch.int64, pin_memory=self._pinned
        )
        batch = self._samples.batch(numbers, out=buffer.numpy())
        if isinstance(batch, np.ndarray):
            return list(buffer.split(self._micro_batch_size))
        others = [torch.from_numpy(array).split(self._micro_batch_size) for array in batch[1:]]
        return list(zip(buffer.split(self._micro_batch_size), *others, strict=True))

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._stopping.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopping.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # the thread may be waiting for room
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> TrainingLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
