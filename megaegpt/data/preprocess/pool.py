"""Worker processes for preprocessing: ordered results, bounded memory, no orphans."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType

from megaegpt.data.preprocess.encode import Encoded, EncodeOptions, Encoder
from megaegpt.data.preprocess.jobs import Content, Job
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import DataError

_AHEAD = 3  # jobs under way for each worker, so that none waits while results are written


class EncoderPool:
    """Encodes jobs on ``workers`` processes; with one worker, in this process by ``tokenizer``.

    Use as a context manager: leaving it ends the processes.

    Args:
        options: how documents become tokens.
        workers: processes.
        tokenizer: loaded before; None: it is loaded.
        private: a file descriptor that workers must not keep open, such as that of a lock.
    """

    def __init__(
        self,
        options: EncodeOptions,
        workers: int,
        tokenizer: Tokenizer | None = None,
        private: int | None = None,
    ) -> None:
        self._workers = workers
        forks = _can_fork()
        self._encoder = Encoder(options, tokenizer) if forks or workers == 1 else None
        self._executor = None
        self._others = set(multiprocessing.active_children())
        if workers > 1:
            context = multiprocessing.get_context("fork" if forks else "spawn")
            arguments = (options, self._encoder, private if forks else None)
            self._executor = ProcessPoolExecutor(workers, context, _start_worker, arguments)

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Encoded]]:
        """Each job with its documents, in the order of the jobs.

        Raises:
            DataError: a worker process has died.
        """
        if self._executor is None:
            assert self._encoder is not None
            for job in jobs:
                yield job, self._encoder(job.content)
            return
        under_way: deque[tuple[Job, Future[Encoded]]] = deque()
        try:
            for job in jobs:
                under_way.append((job, self._executor.submit(_encode, job.content)))
                if len(under_way) >= _AHEAD * self._workers:
                    done, future = under_way.popleft()
                    yield done, future.result()
            while under_way:
                done, future = under_way.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, most likely for lack of memory: use fewer --workers"
            ) from None

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            # Where the system refused a worker, those before it wait for jobs, and the end of the
            # interpreter would wait for them: the executor has not come to know of them.
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()


_encoder: Encoder | None = None  # of a worker process, which does nothing else


def _can_fork() -> bool:
    """Whether workers may be copies of this process, which start several times faster.

    A copy has none of this process' threads, but the locks that they held. So only a process of
    one thread forks, as ``tools/preprocess.py`` is; others spawn.
    """
    return sys.platform == "linux" and threading.active_count() == 1 and "torch" not in sys.modules


def _start_worker(options: EncodeOptions, encoder: Encoder | None, private: int | None) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if private is not None:
        os.close(private)
    _encoder = encoder or Encoder(options)


def _end_with_parent() -> None:
    """A killed main process must not leave workers waiting for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode(content: Content) -> Encoded:
    assert _encoder is not None
    return _encoder(content)
