"""Checkpoints of a run: complete or absent, checksummed, and the last few of them kept.

::

    checkpoints/
      latest                  the name of the folder to resume from
      best                    leads to the folder with the best validation loss, if asked for
      step_00000500/
        manifest.json         step, topology, the loop's state, every file's size and sha256
        deepspeed/            weights and optimizer state, cut by rank
        weights/              whatever the caller's parts add, such as TP-independent safetensors

Each part has one owner: the engine writes and reads ``deepspeed/``, the caller's parts their own
folders, :mod:`~megaegpt.training.checkpoint.manifest` lists and verifies the files,
:mod:`~megaegpt.training.checkpoint.folders` names and removes whole checkpoints, and
:mod:`~megaegpt.training.checkpoint.background` writes beside training. This module has the order of
these steps, and ends each of them on all ranks when it fails on one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from megaegpt.errors import CheckpointError
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import ParamSpec
from megaegpt.parallel.together import all_gather_object, broadcast_object, raising_together
from megaegpt.training.checkpoint.background import BackgroundSave
from megaegpt.training.checkpoint.folders import CheckpointFolders, named_step, step_folder
from megaegpt.training.checkpoint.host_copies import HostCopies
from megaegpt.training.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Topology,
    describe_files,
    verify_files,
)

TrainerState = dict[str, Any]
"""State of the training loop; JSON values only."""

Part = Callable[[HostCopies | None], Callable[[Path], None]]
"""A further part of a checkpoint, called on every rank, where ranks may talk to each other; gives
what fills the part's folder, where they may not. With copies, that is done later, when training has
changed what is not copied by them."""

Parts = Mapping[str, Part]
"""By name of the sub-folder."""

STATE = "deepspeed"


class SavedEngine(Protocol):
    """The part of :class:`~megaegpt.training.engine.engine.Engine` that checkpoints need."""

    grid: ProcessGrid
    topology: Topology

    def parameter_specs(self) -> dict[str, ParamSpec]:
        """The spec of every trainable parameter by name."""

    def save_state(self, folder: Path) -> list[Path]:
        """Write weights and optimizer state under ``folder``; returns this rank's files."""

    def copy_state(self, folder: Path, copies: HostCopies) -> Callable[[], list[Path]]:
        """Copy weights and optimizer state; returns what does as :meth:`save_state` with them,
        without other ranks.
        """

    def load_state(self, folder: Path) -> None:
        """Restore what was saved under the same topology. All ranks raise, or none."""

    def load_reshaped(self, folder: Path, saved: Topology, scratch: Path) -> None:
        """Restore what was saved under the topology ``saved``, with ``scratch`` for its files. All
        ranks raise, or none.
        """


@dataclasses.dataclass
class _Pending:
    """A save that is not complete."""

    step: int
    temporary: Path
    grid: ProcessGrid
    save: BackgroundSave
    is_best: bool = False


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
        self._pending: _Pending | None = None

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names, else the newest complete one, else None."""
        return self._folders.latest()

    def best(self) -> Path | None:
        """The checkpoint that was last marked as the best and is still there."""
        return self._folders.best()

    # -- saving -----------------------------------------------------------------------------------

    def save(
        self, engine: SavedEngine, step: int, state: TrainerState, parts: Parts | None = None
    ) -> Path:
        """Save after ``step`` optimizer steps; collective over all ranks.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on all ranks, when one cannot write (a full disk, say); what was
                there before is untouched.
        """
        self.finish()
        grid = engine.grid
        temporary = self._folders.saving(step_folder(step))
        describe = _manifest_of(engine, step, state)
        on_all = functools.partial(self._run_on_all, grid, step)
        with self._cleared_if_failing(temporary, grid):
            on_all(self._folders.prepare if grid.is_main else _nothing, temporary)
            own = on_all(engine.save_state, temporary / STATE)
            for name, part in (parts or {}).items():
                on_all(_write_part, part, temporary / name)
            entries = on_all(describe_files, own, temporary)  # each rank hashes what it wrote
            written = {
                n: entry for part in all_gather_object(entries, grid) for n, entry in part.items()
            }
            on_all(self._publish if grid.is_main else _nothing, temporary, written, describe)
        return self._folders.final(temporary)

    def save_later(
        self, engine: SavedEngine, step: int, state: TrainerState, parts: Parts | None = None
    ) -> None:
        """As :meth:`save`, but return as soon as all that is saved is copied to host memory. A
        thread of each rank writes it then, while training goes on, and :meth:`advance` publishes
        it; until then the earlier checkpoint is the latest. Collective; waits for such a save that
        is not finished.

        Raises:
            CheckpointError: as for :meth:`save`, of what precedes the writing.
        """
        self.finish()
        grid = engine.grid
        temporary = self._folders.saving(step_folder(step))
        describe = _manifest_of(engine, step, state)
        on_all = functools.partial(self._run_on_all, grid, step)
        copies = HostCopies()
        with self._cleared_if_failing(temporary, grid):
            on_all(self._folders.prepare if grid.is_main else _nothing, temporary)
            write_state = on_all(engine.copy_state, temporary / STATE, copies)
            writes = {name: on_all(part, copies) for name, part in (parts or {}).items()}
        copies.release()

        def write() -> dict[str, FileEntry]:
            with self._naming_failures(step):
                own = write_state()
                for name, write_part in writes.items():
                    write_part(temporary / name)
                return describe_files(own, temporary)

        def publish(written: dict[str, FileEntry]) -> None:
            with self._naming_failures(step):
                self._publish(temporary, written, describe)
            if pending.is_best:
                self._mark_best(step)

        pending = _Pending(step, temporary, grid, BackgroundSave(grid, write, publish))
        self._pending = pending

    def advance(self) -> Path | None:
        """Go on with what :meth:`save_later` began, without waiting; collective over all ranks.

        Returns:
            The checkpoint's folder, when it is complete; None: it is not yet, or nothing was begun.

        Raises:
            CheckpointError: as for :meth:`save`.
        """
        return self._go_on(waiting=False)

    def finish(self) -> Path | None:
        """As :meth:`advance`, but wait until it is complete."""
        return self._go_on(waiting=True)

    def _go_on(self, waiting: bool) -> Path | None:
        if (pending := self._pending) is None:
            return None
        try:
            with self._cleared_if_failing(pending.temporary, pending.grid):
                if waiting:
                    pending.save.finish()
                elif not pending.save.advance():
                    return None
        except BaseException:
            self._pending = None
            raise
        self._pending = None
        return self._folders.final(pending.temporary)

    def mark_best(self, step: int, grid: ProcessGrid) -> None:
        """Keep the checkpoint of ``step`` until another one is the best; collective. One that is
        still being written is marked when it is complete.

        Raises:
            CheckpointError: on all ranks, when the mark cannot be written.
        """
        if (pending := self._pending) is not None:
            if pending.step == step and not pending.save.is_publishing:
                pending.is_best = True
                return
            self.finish()
        with raising_together(grid):
            if grid.is_main:
                self._mark_best(step)

    def restore_best(self, step: int, grid: ProcessGrid) -> str | None:
        """Let ``best`` lead to the checkpoint of ``step`` where a run has gone back behind a later
        one, to none if that of ``step`` is not kept; collective.

        Returns:
            A notice of what has changed.

        Raises:
            CheckpointError: on all ranks, when the mark cannot be written.
        """
        return broadcast_object(lambda: self._restore_best(step), grid)

    def _restore_best(self, step: int) -> str | None:
        wanted, former = self.directory / step_folder(step), self.best()
        if former == wanted:
            return None
        with self._naming_best():
            if wanted in self._folders.complete():
                self._folders.name_best(wanted.name)
                return f"notice: best leads to {wanted.name}, the best so far"
            if self._folders.forget_best():
                return f"notice: best leads nowhere: {wanted.name}, the best so far, is not kept"
        return None

    def _mark_best(self, step: int) -> None:
        with self._naming_best():
            self._folders.name_best(step_folder(step))
            self._folders.remove_old(self.keep, self.keep_every)

    @contextlib.contextmanager
    def _naming_best(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}/best cannot be written: {error.strerror}"
            ) from error

    def _run_on_all(
        self, grid: ProcessGrid, step: int, action: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Call this rank's ``action``; if it fails on one rank, fail on all."""
        with raising_together(grid), self._naming_failures(step):
            return action(*arguments)

    @contextlib.contextmanager
    def _naming_failures(self, step: int) -> Iterator[None]:
        """Say that the checkpoint of ``step`` was not saved, why, and what is left."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            previous = self.latest()
            rest = f"{previous.name} is untouched" if previous else "there is no earlier one"
            reason = str(error)  # what safetensors says of a full disk
            if isinstance(error, OSError):
                reason = f"{error.filename}: {error.strerror}"
            raise CheckpointError(
                f"checkpoint of step {step} was not saved: {reason}; {rest}"
            ) from error

    @contextlib.contextmanager
    def _cleared_if_failing(self, temporary: Path, grid: ProcessGrid) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if grid.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _publish(
        self,
        temporary: Path,
        written: dict[str, FileEntry],
        describe: Callable[[dict[str, FileEntry]], Manifest],
    ) -> None:
        others = [
            path
            for path in sorted(temporary.rglob("*"))
            if path.is_file() and path.relative_to(temporary).as_posix() not in written
        ]
        describe({**written, **describe_files(others, temporary)}).write(temporary)
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


def _nothing(*_: Any) -> None:
    """The action of a rank that only waits for the main one."""


def _write_part(part: Part, folder: Path) -> None:
    part(None)(folder)


def _manifest_of(
    engine: SavedEngine, step: int, state: TrainerState
) -> Callable[[dict[str, FileEntry]], Manifest]:
    """What describes a checkpoint of the engine as it is, once its files are known."""
    topology = dataclasses.asdict(engine.topology)
    parameters = {n: list(s.full_shape) for n, s in engine.parameter_specs().items()}
    return functools.partial(Manifest, step, topology, parameters, state)


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
