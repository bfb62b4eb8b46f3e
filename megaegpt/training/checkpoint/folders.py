"""The folder that holds a run's checkpoints: which are complete, which is the latest, which go.

A checkpoint is written under a name that starts with a dot, flushed, renamed, and only then named
by the file ``latest``. So a process that dies at any moment leaves the previous checkpoint, or the
new one, whole.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from megaegpt.errors import CheckpointError
from megaegpt.files import is_unsupported, sync_folder, warn_unsupported, whole_file
from megaegpt.model.weights import folder_named_by
from megaegpt.training.checkpoint.manifest import MANIFEST, Manifest

_LATEST, _BEST = "latest", "best"
_COMPLETE = re.compile(r"step_\d{8,}")
_SAVING, _REPLACED, _REMOVING = ".saving-", ".replaced-", ".removing-"
_RESHAPING = ".reshaping-"
_TEMPORARY = re.compile(r"^\.(saving|replaced|removing|reshaping)-")


def step_folder(step: int) -> str:
    """Name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


class CheckpointFolders:
    """The checkpoints under ``directory``, which the first save creates."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    # -- looking ----------------------------------------------------------------------------------

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names, else the newest complete one, else None."""
        named = folder_named_by(self.directory / _LATEST)
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if named is not None and _COMPLETE.fullmatch(named.name) and named in self.complete():
                return named
        return max(self.complete(), key=_saved_at, default=None)

    def best(self) -> Path | None:
        """The complete checkpoint that ``best`` leads to or names, if there is one."""
        named = folder_named_by(self.directory / _BEST)
        return named if named in self.complete() else None

    def complete(self) -> list[Path]:
        """Folders under their final name (they were whole when they got it), or moved aside by a
        save of the same step that died before its own took the place.
        """
        if not self.directory.is_dir():
            return []
        entries = sorted(self.directory.iterdir())
        aside = [p for p in entries if _COMPLETE.fullmatch(p.name.removeprefix(_REPLACED))]
        return [p for p in aside if p == self.final(p) or not self.final(p).exists()]

    def final(self, folder: Path) -> Path:
        """Where a folder under one of the temporary names belongs."""
        return self.directory / _TEMPORARY.sub("", folder.name)

    # -- changing ---------------------------------------------------------------------------------

    def saving(self, name: str) -> Path:
        """Where a checkpoint is written before it is complete."""
        return self.directory / f"{_SAVING}{name}"

    def reshaping(self, name: str) -> Path:
        """Where a checkpoint is brought to another topology."""
        return self.directory / f"{_RESHAPING}{name}"

    def prepare(self, temporary: Path) -> None:
        """Make room for a save, after clearing what a killed process left."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".*-step_*"):
            if leftover in self.complete():
                leftover.rename(self.final(leftover))
            elif _TEMPORARY.match(leftover.name):
                shutil.rmtree(leftover)
        temporary.mkdir()

    def publish(self, temporary: Path) -> None:
        """Give a written checkpoint its final name, durably, and let ``latest`` name it."""
        for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
            sync_folder(folder)
        final = self.final(temporary)
        replaced = self.directory / f"{_REPLACED}{final.name}"
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_folder(self.directory)
        with whole_file(self.directory / _LATEST) as written:
            written.write_text(f"{final.name}\n", encoding="utf-8")

    def name_best(self, name: str) -> None:
        """Let the link ``best`` lead to the complete checkpoint ``name``; where the file system has
        no links, ``best`` is a file that names it, as ``latest`` is.
        """
        temporary = self.directory / f".{_BEST}.linking"
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(name)
        except OSError as error:
            if not is_unsupported(error):
                raise
            warn_unsupported(self.directory, "links", f"`{_BEST}` is a file with a name in it")
            with whole_file(self.directory / _BEST) as written:
                written.write_text(f"{name}\n", encoding="utf-8")
            return
        temporary.replace(self.directory / _BEST)
        sync_folder(self.directory)

    def forget_best(self) -> bool:
        """Let ``best`` lead nowhere; whether there was one."""
        try:
            (self.directory / _BEST).unlink()
        except FileNotFoundError:
            return False
        sync_folder(self.directory)
        return True

    def remove_old(self, keep: int, keep_every: int | None = None) -> None:
        """Remove all but the latest, the best, those of every ``keep_every`` steps, and the
        ``keep - 1`` newest others.

        The latest is never removed, whatever the clocks say that dated the checkpoints. What cannot
        be removed waits for the next save, which says so.
        """
        kept = (self.latest(), self.best())
        others = [
            folder
            for folder in self.complete()
            if folder not in kept and not (keep_every and _is_multiple(folder, keep_every))
        ]
        others.sort(key=_saved_at, reverse=True)
        for folder in [*others[keep - 1 :], *self.directory.glob(f"{_REPLACED}*")]:
            doomed = self.directory / f"{_REMOVING}{folder.name.removeprefix(_REPLACED)}"
            with contextlib.suppress(OSError):
                folder.rename(doomed)
                shutil.rmtree(doomed)


def named_step(folder: Path) -> int | None:
    """The step that a checkpoint's name says, under whichever name it is at the moment; None for a
    folder of another name.
    """
    with contextlib.suppress(OSError):
        name = _TEMPORARY.sub("", folder.resolve().name)
        return int(name.removeprefix("step_")) if _COMPLETE.fullmatch(name) else None
    return None


def _is_multiple(folder: Path, steps: int) -> bool:
    step = named_step(folder)
    return step is not None and step % steps == 0


def _saved_at(folder: Path) -> int:
    try:
        return Manifest.read(folder).saved_at_ns
    except CheckpointError:
        return -1  # damaged: never preferred, first to go


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` stands for: itself, the one that ``best`` leads to or names, or
    the latest one of a run's folder or of a directory of checkpoints.

    Raises:
        CheckpointError: it is none of these.
    """
    named = folder_named_by(path) or path
    if (named / MANIFEST).is_file():
        return named
    for directory in (path, path / "checkpoints"):
        latest = CheckpointFolders(directory).latest()
        if latest is not None:
            return latest
    raise CheckpointError(f"{path} holds no checkpoint: give one, a run, or its checkpoints")
