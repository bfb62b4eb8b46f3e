"""The progress bar of preprocessing: input read, documents, tokens/s, MB/s, time left."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from megaegpt.bars import progress_bar
from megaegpt.data.preprocess.progress import Counts


class Meter:
    """Counts what this run has done and shows it on stderr.

    Args:
        total: bytes of input on disk; 0 where it is not known.
        show: draw a bar.
    """

    def __init__(self, total: int, show: bool) -> None:
        self.counts = Counts()
        self._start = time.perf_counter()
        tqdm.monitor_interval = 0  # its thread would keep workers from being forked
        self._bar = progress_bar(
            total=total or None, unit="B", unit_scale=True, disable=not show, dynamic_ncols=True
        )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def add(self, counts: Counts) -> None:
        """Documents have been written."""
        self.counts.add(counts)

    def reach(self, position: int) -> None:
        """``position`` bytes of input are done."""
        self._bar.set_postfix_str(f"{self.counts.documents:,} docs, {self.rates()}", refresh=False)
        self._bar.update(position - self._bar.n)

    def rates(self) -> str:
        """Tokens and bytes of text a second."""
        seconds = max(self.seconds, 1e-9)
        megabytes = self.counts.text_bytes / 1e6
        return f"{self.counts.tokens / seconds:,.0f} tok/s, {megabytes / seconds:.1f} MB/s"

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
