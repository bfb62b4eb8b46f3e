"""Checkpoints of a run: complete or absent, checksummed, and the last few of them kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaegpt.training.engine import Engine

TrainerState = dict[str, Any]
"""What the loop itself remembers; JSON values only."""


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        directory: holds ``step_00000500/`` folders and the file ``latest`` that names one of them.
        keep: complete checkpoints kept.
    """

    def __init__(self, directory: str | Path, keep: int) -> None:
        self.directory = Path(directory)
        self.keep = keep

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint, or None."""
        raise NotImplementedError

    def save(
        self,
        engine: Engine,
        step: int,
        state: TrainerState,
        writers: Mapping[str, Callable[[Path], None]] = {},  # noqa: B006
    ) -> Path:
        """Save after ``step`` optimizer steps. Collective; ``writers`` make further sub-folders by name
        (for example ``{"weights": lambda folder: save_weights(...)}``), called on every rank.
        """
        raise NotImplementedError

    def load(self, engine: Engine, folder: Path | None = None) -> TrainerState:
        """Restore the engine from ``folder`` (default: the latest) and return the trainer's state."""
        raise NotImplementedError
