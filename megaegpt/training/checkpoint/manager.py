"""Checkpoints of a run: complete or absent, checksummed, and the last few of them kept.

::

    checkpoints/
      latest                  the name of the folder to resume from
      best                    leads to the folder with the best validation loss, if asked for
      step_00000500/
        manifest.json         step, topology, the loop's state, every file's size and sha256
        deepspeed/            weights and optimizer state, cut by rank
        weights/              whatever the caller's writers add, such as TP-independent safetensors

Each part has one owner: the engine writes and reads ``deepspeed/``, the caller's writers their own
folders, :mod:`~megaegpt.training.checkpoint.manifest` lists and verifies the files, and
:mod:`~megaegpt.training.checkpoint.folders` names and removes whole checkpoints. This module has
the order of these steps, and ends each of them on all ranks when it fails on one.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from megaegpt.errors import CheckpointError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import ParamSpec
from megaegpt.parallel.together import all_gather_object, broadcast_object, raising_together
from megaegpt.training.checkpoint.folders import CheckpointFolders, named_step, step_folder
from megaegpt.training.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Topology,
    describe_files,
    verify_files,
)

TrainerState = dict[str, Any]
"""State of the training loop; JSON values only."""

Writers = Mapping[str, Callable[[Path], None]]
"""Further parts of a checkpoint: name of a sub-folder -> what fills it, called on every rank."""

STATE = "deepspeed"


class SavedEngine(Protocol):
    """The part of :class:`~megaegpt.training.engine.engine.Engine` that checkpoints need."""

    grid: ProcessGrid
    topology: Topology

    def parameter_specs(self) -> dict[str, ParamSpec]:
        """The spec of every trainable parameter by name."""

    def save_state(self, folder: Path) -> list[Path]:
        """Write weights and optimizer state under ``folder``; returns this rank's files."""

    def load_state(self, folder: Path) -> None:
        """Restore what was saved under the same topology. All ranks raise, or none."""

    def load_reshaped(self, folder: Path, saved: Topology, scratch: Path) -> None:
        """Restore what was saved under the topology ``saved``, with ``scratch`` for its files. All
        ranks raise, or none.
        """


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        directory: where they are; shared by all ranks. Created by the first save.
        keep: complete checkpoints kept, at least 1.
        keep_every: those after a multiple of so many steps are kept besides, and do not count.
    """

    def __init__(self, directory: str | Path, keep: int, keep_every: int | None = None) -> None:
        self.directory = Path(directory)
        self.keep = max(1, keep)
        self.keep_every = keep_every
        self._folders = CheckpointFolders(directory)

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names, else the newest complete one, else None."""
        return self._folders.latest()

    def best(self) -> Path | None:
        """The checkpoint that was last marked as the best and is still there."""
        return self._folders.best()

    # -- saving -----------------------------------------------------------------------------------

    def save(
        self, engine: SavedEngine, step: int, state: TrainerState, writers: Writers | None = None
    ) -> Path:
        """Save after ``step`` optimizer steps; collective over all ranks.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on all ranks, when one cannot write (a full disk, say); what was
                there before is untouched.
        """
        grid = engine.grid
        name = step_folder(step)
        temporary = self._folders.saving(name)
        on_all = functools.partial(self._run_on_all, grid, step)
        on_main = on_all if grid.is_main else lambda *_: on_all(_nothing)
        try:
            on_main(self._folders.prepare, temporary)
            own = on_all(engine.save_state, temporary / STATE)
            for part, write in (writers or {}).items():
                on_all(write, temporary / part)
            entries = on_all(describe_files, own, temporary)  # each rank hashes what it wrote
            written = {
                n: entry for part in all_gather_object(entries, grid) for n, entry in part.items()
            }
            on_main(self._publish, engine, step, state, temporary, written)
        except BaseException:
            if grid.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return self.directory / name

    def mark_best(self, step: int, grid: ProcessGrid) -> None:
        """Keep the checkpoint of ``step`` until another one is the best; collective.

        Raises:
            CheckpointError: on all ranks, when the mark cannot be written.
        """
        with raising_together(grid):
            if grid.is_main:
                try:
                    self._folders.name_best(step_folder(step))
                    self._folders.remove_old(self.keep, self.keep_every)
                except OSError as error:
                    raise CheckpointError(
                        f"{self.directory}/best cannot be written: {error.strerror}"
                    ) from error

    def _run_on_all(
        self, grid: ProcessGrid, step: int, action: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Call this rank's ``action``; if it fails on one rank, fail on all."""
        with raising_together(grid):
            try:
                return action(*arguments)
            except (OSError, SafetensorError) as error:
                previous = self.latest()
                rest = f"{previous.name} is untouched" if previous else "there is no earlier one"
                reason = str(error)  # what safetensors says of a full disk
                if isinstance(error, OSError):
                    reason = f"{error.filename}: {error.strerror}"
                raise CheckpointError(
                    f"checkpoint of step {step} was not saved: {reason}; {rest}"
                ) from error

    def _publish(
        self,
        engine: SavedEngine,
        step: int,
        state: TrainerState,
        temporary: Path,
        written: dict[str, FileEntry],
    ) -> None:
        others = [
            path
            for path in sorted(temporary.rglob("*"))
            if path.is_file() and path.relative_to(temporary).as_posix() not in written
        ]
        manifest = Manifest(
            step=step,
            topology=dataclasses.asdict(engine.topology),
            parameters={n: list(s.full_shape) for n, s in engine.parameter_specs().items()},
            trainer=state,
            files={**written, **describe_files(others, temporary)},
        )
        manifest.write(temporary)
        self._folders.publish(temporary)
        self._folders.remove_old(self.keep, self.keep_every)

    # -- loading ----------------------------------------------------------------------------------

    def load(self, engine: SavedEngine, folder: str | Path | None = None) -> TrainerState:
        """Restore the engine from ``folder`` (default: :meth:`latest`); collective over all ranks.

        Every file is verified first, each by one rank.

        Returns:
            The state that was given to :meth:`save`.

        Raises:
            CheckpointError: on all ranks: there is none, a file is missing or damaged, or it
                was made for another model or topology.
        """
        grid = engine.grid
        chosen = broadcast_object(lambda: Path(folder) if folder else self.latest(), grid)
        if chosen is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint to resume from")
        with raising_together(grid):
            manifest = Manifest.read(chosen)
            _check_name(manifest, chosen)
            mine = sorted(manifest.files)[grid.rank :: grid.world_size]
            verify_files({name: manifest.files[name] for name in mine}, chosen)
            _check_model(manifest, engine, chosen)
            _check_precision(manifest, engine, chosen)
        saved = Topology(**manifest.topology)
        if saved == engine.topology:
            engine.load_state(chosen / STATE)
        else:
            self._reshape(engine, chosen, saved)
        return manifest.trainer

    def _reshape(self, engine: SavedEngine, folder: Path, saved: Topology) -> None:
        scratch = self._folders.reshaping(folder.name)
        try:
            if engine.grid.is_main:
                print(f"{folder.name}: from {saved} to {engine.topology}", flush=True)
                shutil.rmtree(scratch, ignore_errors=True)
            engine.load_reshaped(folder / STATE, saved, scratch)
        finally:  # no rank reads there any more: all have succeeded, or all have raised
            if engine.grid.is_main:
                shutil.rmtree(scratch, ignore_errors=True)


def _nothing() -> None:
    """The action of a rank that only waits for the main one."""


def _check_name(manifest: Manifest, folder: Path) -> None:
    if named_step(folder) not in (None, manifest.step):
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {manifest.step} under another step's name: "
            f"rename it to {step_folder(manifest.step)}"
        )


def _check_model(manifest: Manifest, engine: SavedEngine, folder: Path) -> None:
    ours = {name: list(spec.full_shape) for name, spec in engine.parameter_specs().items()}
    for name in sorted({*ours, *manifest.parameters}):
        saved, wanted = manifest.parameters.get(name), ours.get(name)
        if saved != wanted:
            raise CheckpointError(
                f"{folder} is of another model: {name} is {saved or 'absent'} there and "
                f"{wanted or 'absent'} in this run (the model section, or training.freeze, differs)"
            )


def _check_precision(manifest: Manifest, engine: SavedEngine, folder: Path) -> None:
    saved = Topology(**manifest.topology)
    if saved.precision != engine.topology.precision:
        raise CheckpointError(
            f"{folder} was saved with {saved}, but this run has {engine.topology}: resume with "
            f"training.precision={saved.precision}, or start a new run from its weights"
        )
