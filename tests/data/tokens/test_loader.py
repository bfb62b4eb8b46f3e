"""The loader gives every number of ranks the same global batches, and never hangs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megaegpt.config import BatchRampConfig, BatchSchedule
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.loader import DeviceMover, TrainingLoader
from megaegpt.data.tokens.samples import ChunkWindows, PretrainingSamples
from megaegpt.parallel.grid import ProcessGrid
from tests.data.corpora import counting_stream


@pytest.fixture
def samples(tmp_path: Path) -> PretrainingSamples:
    return PretrainingSamples(counting_stream(tmp_path, 1000), sample_len=8, seed=1)


def take(loader: TrainingLoader, steps: int) -> list:
    with loader:
        return [next(loader) for _ in range(steps)]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "training-loader"]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_global_batch_is_the_same_for_every_dp_size(
    samples: PretrainingSamples, dp_size: int
) -> None:
    ranks = [
        take(TrainingLoader(samples, ProcessGrid(dp_rank=rank, dp_size=dp_size), 8, 2), 20)
        for rank in range(dp_size)
    ]
    for step in range(20):
        micro_steps = zip(*(steps[step] for steps in ranks), strict=True)
        rows = [batch for micro_step in micro_steps for batch in micro_step]
        expected = samples.batch(np.arange(8) + 8 * step)
        for name in ("tokens", "targets"):
            assert np.array_equal(torch.cat([b[name] for b in rows]).numpy(), expected[name])


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("start_step", [0, 5])
def test_a_growing_batch_goes_through_the_samples_in_order_from_any_step(
    samples: PretrainingSamples, dp_size: int, start_step: int
) -> None:
    batches = BatchSchedule(12, BatchRampConfig(start=4, increment=4, steps=3))
    ranks = [
        take(
            TrainingLoader(
                samples, ProcessGrid(dp_rank=r, dp_size=dp_size), batches, 2, start_step
            ),
            8,
        )
        for r in range(dp_size)
    ]
    rows: list[torch.Tensor] = []
    for number, steps in enumerate(zip(*ranks, strict=True), start_step):
        assert len(steps[0]) == batches.size(number) // (2 * dp_size)
        rows += [b["tokens"] for micro_step in zip(*steps, strict=True) for b in micro_step]
    first, last = (batches.samples_before(step) for step in (start_step, start_step + 8))
    assert np.array_equal(torch.cat(rows).numpy(), samples.batch(np.arange(first, last))["tokens"])


def test_an_epoch_over_two_ranks_has_every_sample_once(samples: PretrainingSamples) -> None:
    steps = len(samples) // 4
    seen = [
        batch["tokens"][:, 0]
        for rank in range(2)
        for step in take(TrainingLoader(samples, ProcessGrid(dp_rank=rank, dp_size=2), 4, 1), steps)
        for batch in step
    ]
    starts = torch.cat(seen)
    assert len(starts) == 4 * steps
    assert len(torch.unique(starts)) == 4 * steps


def test_any_step_can_be_the_first(samples: PretrainingSamples) -> None:
    whole = take(TrainingLoader(samples, ProcessGrid(), 4, 2), 40)
    resumed = take(TrainingLoader(samples, ProcessGrid(), 4, 2, start_step=33), 7)
    for expected, got in zip(whole[33:], resumed, strict=True):
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a["tokens"], b["tokens"])


def test_micro_batches_have_their_size_and_windows_their_chunk_numbers(tmp_path: Path) -> None:
    windows = ChunkWindows(counting_stream(tmp_path, 1000), num_chunks=4, chunk_size=5, seed=1)
    (step,) = take(TrainingLoader(windows, ProcessGrid(), 6, 2), 1)
    assert len(step) == 3
    for batch in step:
        tokens, chunk_ids = batch["tokens"], batch["chunk_ids"]
        assert tokens.shape == (2, 20)
        assert tokens.dtype == chunk_ids.dtype == torch.int64
        assert torch.equal(tokens[:, 0], chunk_ids[:, 0] * 5)


def test_batches_handed_out_are_not_overwritten(samples: PretrainingSamples) -> None:
    with TrainingLoader(samples, ProcessGrid(), 2, 2, prefetch=1) as loader:
        first = next(loader)[0]["tokens"]
        copy = first.clone()
        for _ in range(10):
            next(loader)
        assert torch.equal(first, copy)


def test_closing_ends_the_thread_even_when_it_waits_for_room(samples: PretrainingSamples) -> None:
    before = len(loader_threads())
    loader = TrainingLoader(samples, ProcessGrid(), 2, 2, prefetch=1)
    next(loader)
    loader.close()
    loader.close()
    assert len(loader_threads()) == before
    with pytest.raises(StopIteration):
        next(loader)


class FailingSamples:
    """Raises in the background at the third batch."""

    def __init__(self) -> None:
        self.batches = 0

    def __len__(self) -> int:
        return 100

    def batch(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        self.batches += 1
        if self.batches == 3:
            raise OSError("the disk is gone")
        return {"tokens": np.zeros((len(numbers), 2), np.int64)}


def test_an_error_in_the_background_reaches_the_loop() -> None:
    before = len(loader_threads())
    loader = TrainingLoader(FailingSamples(), ProcessGrid(), 1, 1, prefetch=4)
    next(loader)
    next(loader)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
    assert len(loader_threads()) == before


def test_batches_that_do_not_divide_are_refused(samples: PretrainingSamples) -> None:
    with pytest.raises(ValueError, match="6 samples are not whole steps of 4"):
        TrainingLoader(samples, ProcessGrid(dp_size=2), 6, 2)


def test_micro_batches_are_contiguous_and_prepared_in_the_background(tmp_path: Path) -> None:
    windows = ChunkWindows(counting_stream(tmp_path, 1000), num_chunks=4, chunk_size=5, seed=1)
    threads: set[str] = set()

    def prepare(batch: Batch) -> Batch:
        threads.add(threading.current_thread().name)
        return {**batch, "first_half": batch["tokens"][:, :10], "features": batch["targets"].T}

    loader = TrainingLoader(windows, ProcessGrid(), 6, 2, prepare=prepare)
    for step in take(loader, 3):
        for batch in step:
            assert set(batch) == {"tokens", "targets", "chunk_ids", "first_half", "features"}
            assert all(tensor.is_contiguous() for tensor in batch.values())
            assert torch.equal(batch["features"], batch["targets"].T)
    assert threads == {"training-loader"}


class Recorder:
    """In the place of CUDA's streams: notes what is asked of them, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def record_event(self) -> str:
        self.calls.append("record")
        return "copied"

    def wait_event(self, event: str) -> None:
        self.calls.append(f"wait for {event}")


def test_on_a_gpu_copies_start_from_pinned_memory_on_a_stream_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, current = Recorder(), Recorder()
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_contiguous()
        copy = tensor.clone()
        pinned.append(copy.data_ptr())
        return copy

    def copy_to(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        assert tensor.data_ptr() in pinned
        assert device.type == "cuda"
        assert non_blocking
        own.calls.append("copy")
        return tensor

    @contextlib.contextmanager
    def on(stream: Recorder) -> Iterator[None]:
        assert stream is own
        own.calls.append("enter")
        yield
        own.calls.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy_to)
    used = lambda tensor, stream: stream.calls.append("used")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", used)
    mover = DeviceMover(torch.device("cuda", 0))
    rows = torch.arange(12).view(3, 4)
    moving = mover.start({"tokens": rows[:, :-1], "targets": rows[:, 1:]})
    assert own.calls == ["enter", "copy", "copy", "record", "leave"]
    assert current.calls == []
    batch = mover.finish(moving)
    assert current.calls == ["wait for copied", "used", "used"]
    assert torch.equal(batch["targets"], rows[:, 1:])
