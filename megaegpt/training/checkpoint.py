"""Checkpoints of a run: complete or absent, checksummed, and the last few of them kept.

::

    checkpoints/
      latest                  the name of the folder to resume from
      step_00000500/
        manifest.json         step, topology, the loop's state, every file's size and sha256
        deepspeed/            weights and optimizer state, cut by rank
        weights/              whatever the caller's writers add, such as TP-independent safetensors

A checkpoint is written under a name that starts with a dot, flushed, renamed, and only then named
by ``latest``. So a process that dies at any moment leaves the previous checkpoint, or the new one,
whole.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaegpt.errors import CheckpointError
from megaegpt.parallel.agreement import from_all, from_main, raising_together
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.training.engine import Engine
from megaegpt.training.manifest import (
    FileEntry,
    Manifest,
    Topology,
    describe_files,
    sync_folder,
    verify_files,
    write_durably,
)

TrainerState = dict[str, Any]
"""What the loop itself remembers; JSON values only."""

Writers = Mapping[str, Callable[[Path], None]]
"""Further parts of a checkpoint: name of a sub-folder -> what fills it, called on every rank."""

_LATEST = "latest"
_STATE = "deepspeed"
_COMPLETE = re.compile(r"step_\d{8,}")
_SAVING, _REPLACED, _REMOVING = ".saving-", ".replaced-", ".removing-"
_RESHAPING = ".reshaping-"
_TEMPORARY = re.compile(r"^\.(saving|replaced|removing|reshaping)-")


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        directory: where they are; shared by all ranks. Created by the first save.
        keep: complete checkpoints kept, at least 1.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        self.directory = Path(directory)
        self.keep = max(1, keep)

    # -- looking ----------------------------------------------------------------------------------

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names, else the newest complete one, else None."""
        try:
            named = self.directory / (self.directory / _LATEST).read_text(encoding="utf-8").strip()
            if _COMPLETE.fullmatch(named.name) and named in self._complete():
                return named
        except (OSError, UnicodeDecodeError):
            pass
        return max(self._complete(), key=_saved_at, default=None)

    def _complete(self) -> list[Path]:
        """Folders under their final name (they were whole when they got it), or moved aside by a
        save of the same step that died before its own took the place.
        """
        if not self.directory.is_dir():
            return []
        entries = sorted(self.directory.iterdir())
        aside = [p for p in entries if _COMPLETE.fullmatch(p.name.removeprefix(_REPLACED))]
        return [p for p in aside if p == self._final(p) or not self._final(p).exists()]

    def _final(self, folder: Path) -> Path:
        """Where a folder under one of the temporary names belongs."""
        return self.directory / _TEMPORARY.sub("", folder.name)

    # -- saving -----------------------------------------------------------------------------------

    def save(
        self, engine: Engine, step: int, state: TrainerState, writers: Writers | None = None
    ) -> Path:
        """Save after ``step`` optimizer steps; collective over all ranks.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on all ranks, when one cannot write (a full disk, say); what was
                there before is untouched.
        """
        grid = engine.grid
        name = f"step_{step:08d}"
        temporary = self.directory / f"{_SAVING}{name}"
        together = functools.partial(self._together, grid, step)
        try:
            prepare = functools.partial(self._prepare, temporary)
            together(prepare if grid.is_main else None)
            own = together(functools.partial(engine.save_state, temporary / _STATE))
            for part, write in (writers or {}).items():
                together(functools.partial(write, temporary / part))
            entries = together(functools.partial(describe_files, own, temporary))
            written = {n: entry for part in from_all(entries, grid) for n, entry in part.items()}
            finish = functools.partial(self._publish, engine, step, state, temporary, written)
            together(finish if grid.is_main else None)
        except BaseException:
            if grid.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return self.directory / name

    def _together(self, grid: ProcessGrid, step: int, action: Callable[[], Any] | None) -> Any:
        """Run this rank's ``action``; if it fails on one rank, fail on all."""
        with raising_together(grid):
            try:
                return action() if action else None
            except OSError as error:
                previous = self.latest()
                rest = f"{previous.name} is untouched" if previous else "there is no earlier one"
                raise CheckpointError(
                    f"checkpoint of step {step} was not saved: {error.filename}: "
                    f"{error.strerror}; {rest}"
                ) from error

    def _prepare(self, temporary: Path) -> None:
        """Make room, after clearing what a killed process left."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".*-step_*"):
            if leftover in self._complete():
                leftover.rename(self._final(leftover))
            elif _TEMPORARY.match(leftover.name):
                shutil.rmtree(leftover)
        temporary.mkdir()

    def _publish(
        self,
        engine: Engine,
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
        for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
            sync_folder(folder)
        final = self._final(temporary)
        if final.exists():
            final.rename(self.directory / f"{_REPLACED}{final.name}")
        temporary.rename(final)
        sync_folder(self.directory)
        write_durably(self.directory / _LATEST, f"{final.name}\n")
        self._remove_old()

    def _remove_old(self) -> None:
        newest_first = sorted(self._complete(), key=_saved_at, reverse=True)
        for folder in newest_first[self.keep :]:
            doomed = self.directory / f"{_REMOVING}{folder.name}"
            folder.rename(doomed)
            shutil.rmtree(doomed)
        for replaced in self.directory.glob(f"{_REPLACED}*"):
            shutil.rmtree(replaced)

    # -- loading ----------------------------------------------------------------------------------

    def load(self, engine: Engine, folder: str | Path | None = None) -> TrainerState:
        """Restore the engine from ``folder`` (default: :meth:`latest`); collective over all ranks.

        Every file is verified first, each by one rank.

        Returns:
            The state that was given to :meth:`save`.

        Raises:
            CheckpointError: on all ranks: there is none, a file is missing or damaged, or it
                was made for another model or topology.
        """
        grid = engine.grid
        chosen = from_main(Path(folder) if folder else self.latest(), grid)
        if chosen is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint to resume from")
        with raising_together(grid):
            manifest = Manifest.read(chosen)
            mine = sorted(manifest.files)[grid.rank :: grid.world_size]
            verify_files({name: manifest.files[name] for name in mine}, chosen)
            _check_model(manifest, engine, chosen)
            _check_precision(manifest, engine, chosen)
        saved = Topology(**manifest.topology)
        if saved == engine.topology:
            engine.load_state(chosen / _STATE)
        else:
            self._reshape(engine, chosen, saved)
        return manifest.trainer

    def _reshape(self, engine: Engine, folder: Path, saved: Topology) -> None:
        scratch = self.directory / f"{_RESHAPING}{folder.name}"
        try:
            if engine.grid.is_main:
                print(f"{folder.name}: from {saved} to {engine.topology}", flush=True)
                shutil.rmtree(scratch, ignore_errors=True)
            engine.load_reshaped(folder / _STATE, saved, scratch)
        finally:
            if engine.grid.world_size > 1:
                dist.barrier()
            if engine.grid.is_main:
                shutil.rmtree(scratch, ignore_errors=True)


def _saved_at(folder: Path) -> int:
    try:
        return Manifest.read(folder).saved_at_ns
    except CheckpointError:
        return -1  # damaged: never preferred, first to go


def _check_model(manifest: Manifest, engine: Engine, folder: Path) -> None:
    ours = {name: list(spec.full_shape) for name, spec in engine.parameter_specs().items()}
    for name in sorted({*ours, *manifest.parameters}):
        saved, wanted = manifest.parameters.get(name), ours.get(name)
        if saved != wanted:
            raise CheckpointError(
                f"{folder} is of another model: {name} is {saved or 'absent'} there and "
                f"{wanted or 'absent'} in this run's model section"
            )


def _check_precision(manifest: Manifest, engine: Engine, folder: Path) -> None:
    saved = Topology(**manifest.topology)
    if saved.precision != engine.topology.precision:
        raise CheckpointError(
            f"{folder} was saved with {saved}, but this run has {engine.topology}: resume with "
            f"training.precision={saved.precision}, or start a new run from its weights"
        )
