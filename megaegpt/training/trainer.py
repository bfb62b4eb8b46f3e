"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaegpt.config import RunConfig
from megaegpt.data.tokens.loader import TrainingLoader
from megaegpt.errors import TrainingError
from megaegpt.model.calling import ModelInputs
from megaegpt.model.egpt.egpt import EGPT
from megaegpt.parallel.together import (
    all_gather_object,
    all_reduce_max,
    broadcast_object,
    raise_together,
)
from megaegpt.training.checkpoint.manager import CheckpointManager, Writers
from megaegpt.training.engine.engine import Engine, MicroBatch, StepResult
from megaegpt.training.evaluation import Evaluator
from megaegpt.training.logging.best import BestLoss
from megaegpt.training.logging.metrics import SpeedMeter, Stopwatch, log_line
from megaegpt.training.logging.monitor import Monitor
from megaegpt.training.stopping import StopRequests

_MOST_SKIPS_IN_A_ROW = 100


@dataclass
class Trainer:
    """Trains from step ``done`` to the end, or to a request to stop, or to the end of patience."""

    config: RunConfig
    engine: Engine
    inputs: ModelInputs
    loader: TrainingLoader
    checkpoints: CheckpointManager
    monitor: Monitor
    meter: SpeedMeter
    stops: StopRequests
    evaluator: Evaluator | None = None
    sample: Callable[[], str] | None = None
    """Generates a text with the model; called on all ranks together."""
    writers: Writers = field(default_factory=dict)
    """Further parts of a checkpoint."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What the run depends on besides its configuration; kept in checkpoints."""
    progress: Callable[[int], Mapping[str, float]] | None = None
    """What to record of the data, such as a blend's tokens by corpus, after so many samples."""
    best: BestLoss = field(default_factory=BestLoss)
    """Of the evaluations so far."""
    done: int = 0
    """Optimizer steps done."""
    skipped: int = 0
    """Of these, steps whose gradient was not finite."""

    def __post_init__(self) -> None:
        self._grid = self.engine.grid
        self._watch = Stopwatch()
        self._unreported: list[StepResult] = []
        self._micro_nats: list[Tensor] = []
        self._skips_in_a_row = 0
        self._saved = self.done

    def train(self) -> bool:
        """The loop; True if the run is complete, False if it was stopped (and saved) before."""
        run, logging, total = self.config, self.config.logging, self.config.training.steps
        with self.stops, self.loader, _no_automatic_gc():
            if self._due(run.training.eval_interval):
                self._make_up_for_evaluation()
            while self.done < total and not self.best.lost_patience(run.training.patience):
                self._watch.start()
                batch, reason = self._next_batch()
                if reason is not None:
                    self._stop(reason)
                    return False
                self._micro_nats.clear()
                result = self.engine.train_step(self.done, batch, self._nats)
                self._check_finite(result)
                self._unreported.append(result)
                self.done += 1
                if self.done % logging.interval == 0 or self.done == total:
                    self.report()
                if self._due(run.checkpoint.interval):
                    self.save()
                if self._due(run.training.eval_interval):
                    self.evaluate()
            if self.done < total:
                self._end_early()
        return True

    def _due(self, interval: int) -> bool:
        """Whether what happens every ``interval`` steps, and after the last, happens now."""
        at_interval = interval > 0 and self.done > 0 and self.done % interval == 0
        return at_interval or self.done == self.config.training.steps

    def _next_batch(self) -> tuple[list[MicroBatch], str | None]:
        """The step's micro-batches, or why all stop here. One rank's failure is raised on all."""
        batch: list[MicroBatch] = []
        error: Exception | None = None
        try:
            for tokens, *chunk_ids in map(_as_tuple, next(self.loader)):
                batch.append(self.inputs.prepare(tokens[:, :-1], tokens[:, 1:], *chunk_ids))
        except Exception as caught:
            error = caught
        failed, reason = self.stops.agreed(error is not None, self._grid)
        if failed:
            raise_together(error, self._grid)
        return batch, reason

    def _nats(self, model: Callable[..., Tensor], batch: MicroBatch) -> Tensor:
        nats = self.inputs.nats(model, batch)
        self._micro_nats.append(nats.detach())
        return nats

    # -- what happens between steps ---------------------------------------------------------------

    def report(self) -> None:
        """Fetch the losses of the steps since the last report, record and show them."""
        if not self._unreported:
            return
        results, self._unreported = self._unreported, []
        losses = torch.stack([result.loss for result in results]).tolist()
        norms = torch.stack([result.grad_norm for result in results]).tolist()
        speed = self.meter.measure(len(results), self._watch.restart(), self.done)
        (highest,) = all_reduce_max([speed.memory], self._grid)
        speed = dataclasses.replace(speed, memory=highest)
        first = self.done - len(results) + 1
        for step, (loss, norm, result) in enumerate(
            zip(losses, norms, results, strict=True), first
        ):
            values = {"loss": loss, "grad_norm": norm, "lr": result.lr}
            if result.part_norms is not None:
                named = zip(self.engine.part_norms.names, result.part_norms.tolist(), strict=True)
                values |= {f"grad_norm/{name}": norm for name, norm in named}
            if step == self.done:
                values |= {**speed.as_dict(), **self._data_progress()}
            self.monitor.training(step, values)
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        total = self.config.training.steps
        self.monitor.say(
            log_line(self.done, total, mean, norms[-1], results[-1].lr, speed, self.skipped)
        )
        self.monitor.flush()
        gc.collect(1)

    def _data_progress(self) -> Mapping[str, float]:
        samples = self.config.batches.samples_before(self.done)
        return {} if self.progress is None else self.progress(samples)

    def save(self) -> None:
        """Write a checkpoint of the steps so far."""
        self.report()
        with self._not_training():
            began = time.perf_counter()
            progress = {"step": self.done, "skipped": self.skipped, "best": self.best.state()}
            state = {**progress, **self.identity}
            folder = self.checkpoints.save(self.engine, self.done, state, self.writers)
            self.monitor.say(f"saved {folder} in {time.perf_counter() - began:.1f} s")
        self._saved = self.done

    def evaluate(self) -> None:
        """Loss on the validation split, and a generated sample."""
        with self._not_training():
            if self.evaluator is not None:
                result = self.evaluator.evaluate(self.engine.model)
                self.monitor.say(f"step {self.done}: {result}")
                self.monitor.validation(self.done, result)
            if isinstance(self.engine.model, EGPT):
                self._report_gates(self.engine.model.gate_openness())
            if self.sample is not None:
                text = self.sample()
                self.monitor.say(f"step {self.done}: sample\n{text}")
                self.monitor.text("sample", text, self.done)
            self.monitor.flush()
        if self.evaluator is not None:
            self._judge(result.loss)

    def _judge(self, loss: float) -> None:
        """Compare the validation loss of the steps so far with those before."""
        self.best.count(self.done, loss)
        if self.config.checkpoint.keep_best and self.best.step == self.done:
            if self._saved != self.done:
                self.save()
            self.checkpoints.mark_best(self.done, self._grid)

    def _report_gates(self, openness: list[float]) -> None:
        """How far EGPT's memory gates are open, 0 to 1 for each layer that has them."""
        if openness:
            shown = ", ".join(f"{value:.4f}" for value in openness)
            self.monitor.say(f"step {self.done}: memory gates open by {shown}")
            named = {f"memory_gate/{layer:02d}": value for layer, value in enumerate(openness)}
            self.monitor.training(self.done, named)

    def _make_up_for_evaluation(self) -> None:
        """The evaluation due at the step resumed from may have been made before the stop."""
        loss = broadcast_object(lambda: self.monitor.validation_loss(self.done), self._grid)
        if loss is None:
            self.evaluate()
        else:
            self._judge(loss)

    def _end_early(self) -> None:
        if self._saved != self.done:
            self.save()
        best, reason = self.best, "no validation loss was finite"
        if best.loss is not None:
            reason = f"no validation loss better than {best.loss:.4f}, that of step {best.step},"
        self.monitor.say(
            f"ended after step {self.done} of {self.config.training.steps}: {reason} in "
            f"{best.without} evaluations (training.patience)"
        )

    def _stop(self, reason: str) -> None:
        if self._saved != self.done:
            self.save()
        total = self.config.training.steps
        self.monitor.say(
            f"stopped by {reason} after step {self.done} of {total}; go on with --resume"
        )

    @contextlib.contextmanager
    def _not_training(self) -> Iterator[None]:
        self._watch.pause()
        yield
        gc.collect()
        self._watch.start()

    # -- losses and gradients that are not finite -------------------------------------------------

    def _check_finite(self, result: StepResult) -> None:
        if result.applied:
            self._skips_in_a_row = 0
            return
        self.skipped += 1
        if not result.nonfinite:
            return
        self._skips_in_a_row += 1
        problem = self._describe_nonfinite(result)
        if self.config.training.on_nonfinite == "stop":
            error = TrainingError(
                f"{problem}; training.on_nonfinite=skip passes over such steps, "
                f"--resume goes back to {self.checkpoints.latest() or 'step 0'}"
            )
        elif self._skips_in_a_row >= _MOST_SKIPS_IN_A_ROW:
            error = TrainingError(f"{problem}, for the {self._skips_in_a_row}th step in a row")
        else:
            self.monitor.say(f"skipped: {problem}")
            return
        error.on_every_rank = True
        raise error

    def _describe_nonfinite(self, result: StepResult) -> str:
        """Which rank's loss on which samples is at fault. Collective."""
        grid, size = self._grid, self.config.training.micro_batch_size
        batches = self.config.batches
        start = batches.samples_before(self.done)
        own = [
            start + (micro_step * grid.dp_size + grid.dp_rank) * size + row
            for micro_step, nats in enumerate(self._micro_nats)
            if not math.isfinite(nats.item())
            for row in range(size)
        ]
        found = [
            f"rank {rank} (samples {', '.join(map(str, samples))})"
            for rank, samples in enumerate(all_gather_object(own, grid))
            if samples
        ]
        where = f"step {self.done + 1}"
        if found:
            return f"{where}: the loss is not finite on {'; '.join(found)}"
        last = batches.samples_before(self.done + 1) - 1
        return f"{where}: the gradient is not finite (losses are; samples {start}..{last})"


def _as_tuple(batch: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


@contextlib.contextmanager
def _no_automatic_gc() -> Iterator[None]:
    """Python's cycle collector pauses ranks at different times, and all wait for the slowest.

    What lives already is not searched again whenever training itself collects.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
