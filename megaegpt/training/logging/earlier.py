"""What a run has recorded in a folder where another one now starts."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from megaegpt.files import naming_failures
from megaegpt.training.logging.monitor import METRICS


def set_aside_records(folder: str | Path) -> Path | None:
    """Move an earlier run's records out of the way of a new run's, so that neither loses a curve or
    mixes with the other.

    Args:
        folder: a run's ``logging.directory``.

    Returns:
        Where they are now, a folder that is read like any run's: ``earlier_1`` in ``folder``, or
        the next number that is free. None: there were none.

    Raises:
        DataError: they cannot be moved.
    """
    folder = Path(folder)
    metrics = folder / METRICS
    if not metrics.is_file() or metrics.stat().st_size == 0:
        return None
    names = (folder / f"earlier_{number}" for number in itertools.count(1))
    target = next(name for name in names if not name.exists())
    with naming_failures(target):
        target.mkdir()
        if (folder / "config.yaml").is_file():
            shutil.copy2(folder / "config.yaml", target)  # a user may start by this very file
        if (folder / "tensorboard").is_dir():
            (folder / "tensorboard").rename(target / "tensorboard")
        metrics.rename(target / METRICS)  # last: after a kill before it, the next start does it
    return target
