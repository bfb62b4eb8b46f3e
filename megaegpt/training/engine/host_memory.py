"""Memory of tensors on a CPU between their lives."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc
_NEVER = -1


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what tensors free for the tensors of the next step.

    As it is, it returns large blocks to the kernel at once, which maps and clears their pages anew
    when they are next needed: a tenth of a training step and more, for which the process is up to a
    fifth larger now (docs/benchmarks.md). Whoever has set malloc's own variables is left alone, as
    is a machine without glibc. Source: mallopt(3).
    """
    if not sys.platform.startswith("linux"):
        return
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap as well,
        mallopt(_M_TRIM_THRESHOLD, _NEVER)  # which does not shrink
