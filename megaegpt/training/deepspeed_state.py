"""DeepSpeed's checkpoint files: written durably, read without running code from them.

Used by :mod:`megaegpt.training.engine` only. Files are recorded as they are written, so that the
checkpoint manager can checksum them; reading allows tensors, plain containers and the few DeepSpeed
classes below, and refuses every other pickled object.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    PARAMETER_WITH_ROW_PARALLELISM_PATTERNS,
    TP_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
)
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megaegpt.errors import CheckpointError
from megaegpt.parallel.params import ParamSpec

_TRUSTED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
_UNIVERSAL_VERSION = 0.2


class _CheckpointFiles(TorchCheckpointEngine):
    """torch.save and torch.load as DeepSpeed calls them, made durable and safe.

    A failed write is kept in ``error`` and not raised: DeepSpeed passes a barrier after writing,
    where the other ranks would wait for this one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Path] = []
        self.error: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.error = self.error or as_os_error(error, path)
        self.written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(_TRUSTED_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)


def install(engine: Any) -> None:
    """Make a DeepSpeed engine read and write through :class:`_CheckpointFiles`."""
    engine.checkpoint_engine = _CheckpointFiles()
    # Its recovery scripts would be copied into each checkpoint; they refuse tensor parallelism.
    engine._copy_recovery_script = lambda save_path: None


def save(engine: Any, folder: Path, specs: dict[str, ParamSpec]) -> list[Path]:
    """Write ``engine``'s weights and optimizer state under ``folder``; collective.

    Returns:
        The files that this rank wrote.

    Raises:
        OSError: this rank could not write one of them.
    """
    files: _CheckpointFiles = engine.checkpoint_engine
    files.written, files.error = [], None
    engine.save_checkpoint(
        str(folder.parent),
        tag=folder.name,
        client_state={UNIVERSAL_CHECKPOINT_INFO: universal_info(specs)},
        save_latest=False,
        exclude_frozen_parameters=True,
    )
    if files.error is not None:
        raise files.error
    return files.written


def load(engine: Any, folder: Path) -> None:
    """Restore what :func:`save` wrote, under the same topology; collective.

    Raises:
        CheckpointError: a file is missing, holds more than tensors, or is of another model.
    """
    try:
        with contextlib.redirect_stdout(None):  # DeepSpeed prints while it loads
            path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        AssertionError,
        pickle.PickleError,
    ) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(f"{folder} cannot be loaded into this model: {reason}") from e
    if path is None:
        raise CheckpointError(f"{folder} holds no weights for this rank")


def universal_info(specs: dict[str, ParamSpec]) -> dict[str, Any]:
    """How DeepSpeed's universal checkpoint puts the slices of each parameter together.

    Padded vocabulary rows are the same at every tensor-parallel size, so vocabulary matrices are
    cut and joined like any other; no parameter needs DeepSpeed's re-padding.
    """
    replicated = [name for name, spec in specs.items() if spec.tp_dim is None]
    by_row = [name for name, spec in specs.items() if spec.tp_dim == 1]
    return {
        UNIVERSAL_CHECKPOINT_VERSION_KEY: _UNIVERSAL_VERSION,
        TP_REPLICATED_PARAMETER_PATTERNS: [_exactly(name) for name in replicated],
        PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: [_exactly(name) for name in by_row],
    }


def _exactly(name: str) -> str:
    return re.escape(name) + "$"


def as_os_error(error: Exception, path: str | Path) -> OSError:
    """The operating system's reason behind a failed torch write, naming the file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(cause.errno or errno.EIO, cause.strerror or str(cause), str(path))
