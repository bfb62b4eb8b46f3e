"""Global batches, prepared ahead by a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from megaegpt.config.batch_ramp import BatchSchedule
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.samples import Samples

if TYPE_CHECKING:
    from megaegpt.parallel.grid import ProcessGrid


class Moving(NamedTuple):
    """A micro-batch whose copies to the device may still be under way."""

    batch: Batch
    arrived: torch.cuda.Event | None


class DeviceMover:
    """Brings micro-batches to a device without making the host, or the device's work, wait.

    On a GPU :meth:`start` copies from pinned memory on a stream of its own; :meth:`finish` lets the
    current stream wait for the copy, and the allocator know that this stream uses the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, batch: Batch) -> Moving:
        """Make a batch on the CPU contiguous and begin to copy it; from any thread."""
        whole = {name: tensor.contiguous() for name, tensor in batch.items()}
        if self._stream is None:
            return Moving(whole, None)
        pinned = {name: tensor.pin_memory() for name, tensor in whole.items()}
        with torch.cuda.stream(self._stream):
            moved = {n: x.to(self._device, non_blocking=True) for n, x in pinned.items()}
            return Moving(moved, self._stream.record_event())

    def finish(self, moving: Moving) -> Batch:
        """The batch for the current stream."""
        if moving.arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(moving.arrived)
            for tensor in moving.batch.values():
                tensor.record_stream(current)
        return moving.batch


class TrainingLoader:
    """Iterate over optimizer steps; each gives this rank's micro-batches as a list.

    Batches are contiguous and on the grid's device: a background thread draws them, prepares them
    and starts their copies, from pinned memory on a stream of its own, while the steps before run.

    A step has the samples that follow those of the steps before; micro-step m of data-parallel
    rank r takes the ``micro_batch_size`` of them from ``(m * dp_size + r) * micro_batch_size`` on.
    So a step sees the same samples whatever the number of ranks, and any step can be the first.

    The iteration has no end; use the loader as a context manager, or close it.

    Args:
        samples: ``PretrainingSamples``, ``ChunkWindows``, ``InstructionSamples``, or a blend.
        grid: this process's place; ``dp_rank``, ``dp_size`` and ``device`` are used.
        global_batch_size: samples a step, one number or how they grow; multiples of
            ``micro_batch_size * grid.dp_size``.
        micro_batch_size: samples a micro-batch.
        start_step: first step to give, for resuming.
        prefetch: steps prepared ahead; on a GPU their batches are in its memory.
        prepare: what else happens to a micro-batch on the CPU, such as reading stored features.
    """

    def __init__(
        self,
        samples: Samples,
        grid: ProcessGrid,
        global_batch_size: int | BatchSchedule,
        micro_batch_size: int,
        start_step: int = 0,
        prefetch: int = 2,
        prepare: Callable[[Batch], Batch] = dict,
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
        self._prepare = prepare
        self._mover = DeviceMover(grid.device)
        micro_steps = np.arange(batches.final // per_micro_step)
        first = (micro_steps * grid.dp_size + grid.dp_rank) * micro_batch_size
        self._rows = (first[:, None] + np.arange(micro_batch_size)).ravel()  # ascending
        self._ready: queue.Queue[list[Moving] | BaseException] = queue.Queue(max(1, prefetch))
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(start_step,), name="training-loader", daemon=True
        )
        self._thread.start()

    def _fill(self, step: int) -> None:
        """The background thread: batches in order until told to stop; an error is passed on."""
        try:
            while not self._stopping.is_set():
                self._ready.put(self._batch_of(step))
                step += 1
        except BaseException as error:
            self._ready.put(error)

    def _batch_of(self, step: int) -> list[Moving]:
        rows = self._rows[: np.searchsorted(self._rows, self._batches.size(step))]
        arrays = self._samples.batch(self._batches.samples_before(step) + rows)
        size = self._micro_batch_size
        split = {name: torch.from_numpy(array).split(size) for name, array in arrays.items()}
        micro_batches = [
            dict(zip(split, tensors, strict=True)) for tensors in zip(*split.values(), strict=True)
        ]
        return [self._mover.start(self._prepare(batch)) for batch in micro_batches]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._stopping.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return [self._mover.finish(moving) for moving in item]

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
