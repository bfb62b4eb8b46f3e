"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from megaegpt.config import RunConfig
from megaegpt.data.tokens.batch import Batch
from megaegpt.data.tokens.loader import TrainingLoader
from megaegpt.errors import CheckpointError, MegaEGPTError, TrainingError
from megaegpt.evaluation.task_in_training import TaskInTraining
from megaegpt.evaluation.text_loss import AbandonedEvaluationError, Evaluator
from megaegpt.model.base import LanguageModel
from megaegpt.parallel.together import (
    all_gather_object,
    all_reduce_max,
    broadcast_object,
    raise_together,
)
from megaegpt.training.checkpoint.manager import CheckpointManager, Parts
from megaegpt.training.consumption import Consumption
from megaegpt.training.logging.best import BestLoss
from megaegpt.training.logging.metrics import SpeedMeter, Stopwatch, log_line
from megaegpt.training.logging.monitor import Monitor
from megaegpt.training.logging.profiling import StepProfiler
from megaegpt.training.stopping import StopRequests

if TYPE_CHECKING:  # DeepSpeed is imported when an engine is made
    from megaegpt.training.engine.engine import Engine, StepResult

T = TypeVar("T")

_MOST_SKIPS_IN_A_ROW = 100


@dataclass
class Trainer:
    """Trains from step ``done`` to the end, or to a request to stop, or to the end of patience."""

    config: RunConfig
    model: LanguageModel
    engine: Engine
    loader: TrainingLoader
    consumption: Consumption
    checkpoints: CheckpointManager
    monitor: Monitor
    meter: SpeedMeter
    stops: StopRequests
    profiler: StepProfiler
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)
    """Of the validation sets by name."""
    tasks: Mapping[str, TaskInTraining] = field(default_factory=dict)
    """Scored beside them, by name."""
    sample: Callable[[], str] | None = None
    """Generates a text with the model; called on all ranks together."""
    parts: Parts = field(default_factory=dict)
    """Further parts of a checkpoint."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Facts besides the configuration that decide the run's losses; kept in checkpoints."""
    progress: Callable[[int], Mapping[str, float]] | None = None
    """Number of samples -> values of the data to record, such as a blend's tokens by corpus."""
    best: BestLoss = field(default_factory=BestLoss)
    """The best loss of the evaluations so far."""
    judged_anew: bool = False
    """The best was chosen on something else before: what is on record of step ``done`` is no loss
    to compare with."""
    done: int = 0
    """Optimizer steps done."""
    skipped: int = 0
    """Steps among those done whose gradient was not finite."""
    spikes: int = 0
    """Steps among those done that the guard against spikes left out."""

    def __post_init__(self) -> None:
        self._grid = self.engine.grid
        self._watch = Stopwatch()
        self._upcoming: tuple[list[Batch], Exception | None] | None = None
        self._unreported: list[StepResult] = []
        self._skips_in_a_row = 0
        self._saved = self.done
        self._saving: tuple[float, float] | None = None
        """Of a save whose files are being written: when it began, and how long the step waited."""

    def train(self) -> bool:
        """The loop; True if the run is complete, False if it was stopped (and saved) before."""
        with self.stops, self.loader, self.profiler, _no_automatic_gc():
            try:
                complete = self._take_steps()
            except MegaEGPTError as error:
                if error.on_every_rank or self._grid.world_size == 1:
                    self._finish_saving_before_an_end()
                raise
            self._finish_saving()
        return complete

    def _take_steps(self) -> bool:
        run, logging, total = self.config, self.config.logging, self.config.training.steps
        if not self._make_up_for_evaluation():
            return False
        self._restore_best()
        while self.done < total and not self.best.lost_patience(run.training.patience):
            self._watch.start()
            batch, reason = self._next_batch()
            if reason is not None:
                self._stop(reason)
                return False
            if self._saving is not None:
                self._note_saved(self.checkpoints.advance())
            self.profiler.enter(self.done + 1)
            result = self.engine.train_step(self.done, batch)
            self._check_finite(result)
            self._unreported.append(result)
            self.done += 1
            self.profiler.leave(self.done)
            if self.done % logging.interval == 0 or self.done == total:
                self.report()
            if self._due(run.checkpoint.interval) or self._due(run.checkpoint.keep_every or 0):
                self.save()
            if self._due(run.training.eval_interval) and not self.evaluate():
                return False
        if self.done < total:
            self._end_early()
        return True

    def _due(self, interval: int) -> bool:
        """Whether what happens every ``interval`` steps, and after the last, happens now."""
        at_interval = interval > 0 and self.done > 0 and self.done % interval == 0
        return at_interval or self.done == self.config.training.steps

    def _next_batch(self) -> tuple[list[Batch], str | None]:
        """The step's micro-batches, or why all stop here. One rank's failure is raised on all.

        The ranks agree on a step while the one before runs: gloo's messages go round all of them
        one after the other, which takes milliseconds where there are many.
        """
        batch, error = self._upcoming or self._draw_batch()
        failed, reason = self.stops.answer()
        if failed:
            raise_together(error, self._grid)
        self._upcoming = None
        if reason is None and self.done + 1 < self.config.training.steps:
            self._upcoming = self._draw_batch()
        return batch, reason

    def _draw_batch(self) -> tuple[list[Batch], Exception | None]:
        """Take the next batch from the loader, and ask all ranks whether theirs is there."""
        batch: list[Batch] = []
        error: Exception | None = None
        try:
            batch = next(self.loader)
        except Exception as caught:
            error = caught
        self.stops.ask(error is not None, self._grid)
        return batch, error

    # -- what happens between steps ---------------------------------------------------------------

    def report(self) -> None:
        """Fetch the losses of the steps since the last report, record and show them."""
        if not self._unreported:
            return
        results, self._unreported = self._unreported, []
        losses = torch.stack([result.loss for result in results]).tolist()
        self._check_losses(results, losses)
        norms = torch.stack([result.grad_norm for result in results]).tolist()
        speed = self.meter.measure(len(results), self._watch.restart(), self.done)
        (highest,) = all_reduce_max([speed.memory], self._grid)
        speed = dataclasses.replace(speed, memory=highest)
        first = self.done - len(results) + 1
        for step, (loss, norm, result) in enumerate(
            zip(losses, norms, results, strict=True), first
        ):
            values = {"loss": loss, "grad_norm": norm, "lr": result.lr}
            values["tokens_seen"] = self.consumption.tokens(step)
            if result.module_norms is not None:
                norms_of = result.module_norms.tolist()
                named = zip(self.engine.module_norms.names, norms_of, strict=True)
                values |= {f"grad_norm/{name}": norm for name, norm in named}
            if step == self.done:
                values |= {**speed.as_dict(), **self._data_progress()}
                values["tokens_per_sample"] = self.meter.tokens_per_sample
                if self.engine.spike_guard.is_on:
                    values["spikes"] = self.spikes
            self.monitor.training(step, values)
        finite = [loss for loss in losses if isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else nan
        total = self.config.training.steps
        left_out = {"skipped": self.skipped, "spikes": self.spikes}
        self.monitor.log(
            log_line(self.done, total, mean, norms[-1], results[-1].lr, speed, left_out)
        )
        self.monitor.flush()
        gc.collect(1)

    def _data_progress(self) -> Mapping[str, float]:
        samples = self.consumption.batches.samples_before(self.done)
        return {} if self.progress is None else self.progress(samples)

    def save(self) -> None:
        """Write a checkpoint of the steps so far, or begin to."""
        self.report()
        with self._not_training():
            self._finish_saving()
            began = time.perf_counter()
            state = {**self._progress(), **self.identity}
            if self.config.checkpoint.asynchronous:
                self.checkpoints.save_later(self.engine, self.done, state, self.parts)
                self._saving = began, time.perf_counter() - began
            else:
                folder = self.checkpoints.save(self.engine, self.done, state, self.parts)
                self.monitor.log(f"saved {folder} in {time.perf_counter() - began:.1f} s")
        self._saved = self.done

    def _progress(self) -> dict[str, Any]:
        """The part of the loop's state that grows."""
        progress = {"step": self.done, "skipped": self.skipped, "best": self.best.state()}
        progress |= self.consumption.state(self.done)
        if (guard := self.engine.spike_guard).is_on:
            progress |= {"spikes": self.spikes, "gradient_norms": guard.state()}
        return progress

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Collective."""
        self._note_saved(self.checkpoints.finish())

    def _finish_saving_before_an_end(self) -> None:
        """Complete what a run that has failed on all ranks can go back to; what fails of it is told
        beside the reason of the end, not in its place.
        """
        try:
            self._finish_saving()
        except CheckpointError as failure:
            self.monitor.log(f"notice: {failure}")

    def _note_saved(self, folder: Path | None) -> None:
        """Say of a checkpoint that it is complete; None: it is not yet."""
        if folder is not None and self._saving is not None:
            began, waited = self._saving
            seconds = time.perf_counter() - began
            self.monitor.log(f"saved {folder} in {seconds:.1f} s; training waited {waited:.1f} s")
            self._saving = None

    def evaluate(self) -> bool:
        """Losses on the validation sets, the tasks, and a generated sample; False if all was left
        for a request to stop, and the run is saved.
        """
        try:
            with self._not_training():
                judged = self._measure()
                self.monitor.flush()
        except AbandonedEvaluationError as end:
            self._leave_evaluation(str(end))
            return False
        if (value := judged.get(self.config.checkpoint.best_of)) is not None:
            self._judge(value)
        return True

    def _measure(self) -> dict[str, float]:
        """Losses and the tasks' errors. All of them are recorded or none, for what is left is made
        up for whole.
        """
        why_end, losses, tried = self.stops.watch(self._grid), {}, {}
        for name, evaluator in self.evaluators.items():
            loss = self._same_everywhere(evaluator.evaluate(self.model, why_end))
            of_set = "" if name == "validation" else f"{name}: "
            self.monitor.log(f"step {self.done}: {of_set}{loss}")
            losses[name] = loss
        whole = self.tasks or self.sample is not None
        with self.engine.whole_model() if whole else contextlib.nullcontext():
            for name, task in self.tasks.items():
                tried[name] = self._same_everywhere(task.evaluate(why_end))
                self.monitor.log(f"step {self.done}: {name}: {tried[name]}")
            for name, loss in losses.items():
                self.monitor.validation(self.done, loss, name)
            for name, result in tried.items():
                self.monitor.task(self.done, result, name)
            self._report_metrics()
            if self.sample is not None:
                text = self.sample()
                self.monitor.log(f"step {self.done}: sample\n{text}")
                self.monitor.text("sample", text, self.done)
        by_loss = {name: loss.loss for name, loss in losses.items()}
        return by_loss | {name: result.error for name, result in tried.items()}

    def _leave_evaluation(self, reason: str) -> None:
        self.stops.answer()  # about a step that is not taken
        self.monitor.log(
            f"step {self.done}: the evaluation was left for {reason}; --resume makes up for it"
        )
        self._stop(reason)

    def _same_everywhere(self, result: T) -> T:
        """Rank 0's, for what follows from it must be the same everywhere, to the last bit."""
        return broadcast_object(lambda: result, self._grid)

    def _judge(self, loss: float) -> None:
        """Compare the validation loss of the steps so far with those before."""
        if not isfinite(loss):
            self._on_nonfinite(f"step {self.done}: the validation loss is not finite ({loss})")
        self.best.count(self.done, loss)
        if self.config.checkpoint.keep_best and self.best.step == self.done:
            if self._saved != self.done:
                self.save()
            self.checkpoints.mark_best(self.done, self._grid)

    def _restore_best(self) -> None:
        """A run that has gone back to an earlier checkpoint leaves another branch's best behind."""
        if self.config.checkpoint.keep_best and self.best.loss is not None:
            notice = self.checkpoints.restore_best(self.best.step, self._grid)
            if notice is not None:
                self.monitor.log(notice)

    def _report_metrics(self) -> None:
        """Log the model's metrics, such as how far an EGPT's memory gates are open."""
        metrics = self.model.metrics()
        if metrics:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.monitor.log(f"step {self.done}: {shown}")
            self.monitor.training(self.done, metrics)

    def _make_up_for_evaluation(self) -> bool:
        """The evaluation at the step resumed from may have been made before the stop, and be newer
        than its checkpoint, whether one is due there now or not; False as of :meth:`evaluate`.
        """
        loss = broadcast_object(lambda: self.monitor.judged_value(self.done), self._grid)
        if loss is None:
            return not self._due(self.config.training.eval_interval) or self.evaluate()
        measured = self.config.checkpoint.best_of in {*self.evaluators, *self.tasks}
        if measured and not self.judged_anew:
            self._judge(loss)
        return True

    def _end_early(self) -> None:
        self.stops.answer()  # about a step that is not taken
        if self._saved != self.done:
            self.save()
        self._finish_saving()
        best, reason = self.best, "no validation loss was finite"
        if best.loss is not None:
            reason = f"no validation loss better than {best.loss:.4f}, that of step {best.step},"
        self.monitor.log(
            f"ended after step {self.done} of {self.config.training.steps}: {reason} in "
            f"{best.without} evaluations (training.patience)"
        )

    def _stop(self, reason: str) -> None:
        if self._saved != self.done:
            self.save()
        self._finish_saving()
        total = self.config.training.steps
        self.monitor.log(
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
        if result.spike is not None:
            self._note_spike(result.grad_norm.item(), result.spike)
            return
        self.skipped += 1
        if not result.nonfinite:
            return
        self._skips_in_a_row += 1
        problem = self._describe_nonfinite(result, self.done)
        if self._skips_in_a_row >= _MOST_SKIPS_IN_A_ROW:
            raise _everywhere(f"{problem}, for the {self._skips_in_a_row}th step in a row")
        self._on_nonfinite(problem)

    def _note_spike(self, norm: float, median: float) -> None:
        self.spikes += 1
        first, last = self._samples_of(self.done)
        guard = self.config.training.spike_guard
        self.monitor.log(
            f"skipped: step {self.done + 1}: the gradient norm {norm:.4g} is above "
            f"{guard.factor:g} times {median:.4g}, the median of {guard.window} steps "
            f"(training.spike_guard; samples {first}..{last})"
        )

    def _samples_of(self, before: int) -> tuple[int, int]:
        """Numbers of the first and the last sample of the step after ``before`` steps."""
        batches = self.consumption.batches
        return batches.samples_before(before), batches.samples_before(before + 1) - 1

    def _check_losses(self, results: list[StepResult], losses: list[float]) -> None:
        """An infinite loss may have a finite gradient, so that its step was applied. Losses are
        fetched here, not in each step; nothing is saved or evaluated before. Collective.
        """
        pairs = zip(results, losses, strict=True)
        bad = [n for n, (result, loss) in enumerate(pairs) if result.applied and not isfinite(loss)]
        first = self.done - len(results)
        for number in broadcast_object(lambda: bad, self._grid):
            problem = self._describe_nonfinite(results[number], first + number)
            self._on_nonfinite(f"{problem}; its gradient is, and was applied")

    def _on_nonfinite(self, problem: str) -> None:
        """Do what ``training.on_nonfinite`` says: end the run everywhere, or note it and go on."""
        if self.config.training.on_nonfinite == "skip":
            self.monitor.log(f"skipped: {problem}")
            return
        self._finish_saving()
        latest = broadcast_object(self.checkpoints.latest, self._grid)
        raise _everywhere(
            f"{problem}; training.on_nonfinite=skip passes over such steps, "
            f"--resume goes back to {latest or 'step 0'}"
        )

    def _describe_nonfinite(self, result: StepResult, before: int) -> str:
        """Which rank's loss on which samples of the step after ``before`` steps is at fault.
        Collective.
        """
        grid, size = self._grid, self.config.training.chosen_micro_batch_size
        start, last = self._samples_of(before)
        own = [
            start + (micro_step * grid.dp_size + grid.dp_rank) * size + row
            for micro_step, loss in enumerate(result.micro_losses)
            if not isfinite(loss.item())
            for row in range(size)
        ]
        found = [
            f"rank {rank} (samples {', '.join(map(str, samples))})"
            for rank, samples in enumerate(all_gather_object(own, grid))
            if samples
        ]
        where = f"step {before + 1}"
        if found:
            return f"{where}: the loss is not finite on {'; '.join(found)}"
        return f"{where}: the gradient is not finite (losses are; samples {start}..{last})"


def _everywhere(message: str) -> TrainingError:
    """An error that every rank raises and rank 0 shows."""
    error = TrainingError(message)
    error.on_every_rank = True
    return error


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
