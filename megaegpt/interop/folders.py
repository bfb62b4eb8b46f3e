"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from megaegpt.data.files import umask
from megaegpt.errors import CheckpointError


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``folder``, synced, when the block ends well.

    Raises:
        CheckpointError: ``folder`` holds something already, or writing failed in the block.
    """
    folder = Path(os.path.abspath(folder))  # without resolving: a link may lead to an empty folder
    temporary = None
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists already: remove it, or name another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o666 & ~umask())  # safetensors and mkdtemp make them for their owner alone
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        temporary.chmod(0o777 & ~umask())
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder} cannot be written: {reason}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
