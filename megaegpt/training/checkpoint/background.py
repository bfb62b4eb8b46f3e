"""A save whose files a thread of each rank writes while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_gather_object, raising_together, start_all_reduce_max
from megaegpt.training.checkpoint.manifest import FileEntry

Entries = dict[str, FileEntry]


class BackgroundSave:
    """Two tasks, one after the other: every rank writes its files, then the main one publishes.

    The threads only write. Ranks talk to each other in their main threads, in :meth:`advance` and
    :meth:`finish`, since a process group may not be used by two threads at once.

    Args:
        write: writes this rank's files; gives their entries in the manifest.
        publish: called on the main rank with the entries of all ranks.
    """

    def __init__(
        self, grid: ProcessGrid, write: Callable[[], Entries], publish: Callable[[Entries], None]
    ) -> None:
        self._grid = grid
        self._publish = publish
        self._publishing = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._task: Future[Any] = self._thread.submit(write)
        self._unfinished: Callable[[], list[int]] | None = None

    @property
    def is_publishing(self) -> bool:
        """Whether all files are written."""
        return self._publishing

    def advance(self) -> bool:
        """Go on to the next task if every rank had finished its own at the last call. Collective.

        Returns:
            Whether the checkpoint is published.

        Raises:
            Exception: of a task of some rank: on every rank, after all tasks have ended.
        """
        asked, self._unfinished = self._unfinished, None
        if asked is None or asked() != [0]:
            self._unfinished = start_all_reduce_max([not self._task.done()], self._grid)
            return False
        return self._go_on()

    def finish(self) -> None:
        """Wait until the checkpoint is published. Collective.

        Raises:
            Exception: as for :meth:`advance`.
        """
        if self._unfinished is not None:
            self._unfinished()  # every rank has begun to ask
            self._unfinished = None
        while not self._go_on():
            pass

    def _go_on(self) -> bool:
        try:
            with raising_together(self._grid):
                result = self._task.result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        if self._publishing:
            self._thread.shutdown(wait=False)
            return True
        self._publishing = True
        written = {n: e for part in all_gather_object(result, self._grid) for n, e in part.items()}
        action = self._publish if self._grid.is_main else _nothing
        self._task = self._thread.submit(action, written)
        return False


def _nothing(written: Entries) -> None:
    """The task of a rank that does not publish."""
