"""Memory that a tensor frees is there for the next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, torch
from megaegpt.training.engine.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for numbers in (2**24, 2**23, 2**24):  # 64 and 32 MB
        torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
for _ in range(20):  # malloc settles: its cache holds seven blocks of a size
    last = faults()
print(first, last)
"""


def _faults(**environment: str) -> tuple[int, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=clean | environment,
    )
    first, last = map(int, result.stdout.split())
    return first, last


pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="this is about glibc's malloc"
)


def test_a_freed_tensors_pages_are_not_mapped_anew() -> None:
    first, last = _faults()
    assert first > 50  # 80 huge pages, or 40,960 small ones
    assert last == 0


def test_malloc_that_a_user_has_tuned_is_left_alone() -> None:
    first, last = _faults(MALLOC_MMAP_THRESHOLD_="65536")
    assert last > first / 2
