"""One run writes into its folders at a time: one that is started twice must not mix with itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megaegpt.errors import FolderInUseError
from megaegpt.files import locked_folder, made_folder
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import raising_together

WAIT_S = 60.0
"""How long a run waits for its predecessor, which may be saving still after its launcher's end."""

_POLL_S = 0.2


_OTHER_FOLDERS = "let it end, or set logging.directory and checkpoint.directory to new folders"


@contextlib.contextmanager
def locked_folders(
    folders: Sequence[str | Path], grid: ProcessGrid, remedy: str = _OTHER_FOLDERS
) -> Iterator[None]:
    """Hold the locks of ``folders``, which are made where they are missing, inside the block; rank
    0 does it for all. Collective at the block's beginning.

    Folders that were made and are still empty in the end are removed again.

    Args:
        remedy: what the user can do where another process goes on for longer than that.

    Raises:
        FolderInUseError: another process holds one of them still after :data:`WAIT_S`.
        DataError: one of them cannot be written.
    """
    with contextlib.ExitStack() as held:
        with raising_together(grid):
            if grid.is_main:
                for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
                    held.enter_context(made_folder(folder))
                    _lock(folder, held, remedy)
        yield


def _lock(folder: Path, held: contextlib.ExitStack, remedy: str) -> None:
    deadline, told = time.monotonic() + WAIT_S, False
    while True:
        try:
            held.enter_context(locked_folder(folder))
            return
        except FolderInUseError as error:
            if time.monotonic() >= deadline:
                raise FolderInUseError(f"{error}: {remedy}") from None
            if not told:
                print(f"notice: {error}: waiting {WAIT_S:.0f} s for its end", flush=True)
                told = True
        time.sleep(_POLL_S)
