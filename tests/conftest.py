"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from megaegpt.parallel.launcher_variables import without_launcher
from tests.distributed.harness import Distributed

settings.register_profile("any machine", deadline=None)  # how fast an example runs is its matter
settings.load_profile("any machine")
torch.set_num_threads(1)  # more would wait for the other test process and for the ranks


def _forget_launcher() -> None:
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        del os.environ[name]


_forget_launcher()  # these processes are none of its ranks
os.environ.setdefault("MEGAEGPT_DEVICE", "cpu")  # on any machine, but for the tests marked gpu

os.environ.setdefault("MEGAEGPT_KERNELS", "onednn")  # nothing depends on how fast products are


@pytest.fixture(autouse=True)
def _no_group_is_left_behind() -> Iterator[None]:
    """A program that a test calls in this process may end with the process group that it joined,
    and leaves a LOCAL_RANK; whether the next test's program finds one must not depend on the order
    of the tests."""
    yield
    _forget_launcher()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _tests_for_a_gpu_may_use_it(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others compute on the CPU where there is a GPU as well: they compare bits, and start more
    ranks than it has GPUs."""
    if request.node.get_closest_marker("gpu") is not None:
        for name in ("MEGAEGPT_DEVICE", "DS_ACCELERATOR"):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def distributed() -> Iterator[Distributed]:
    """Run a function on 1, 2 or 4 gloo ranks: ``distributed(2, function, *args)``.

    A module's, since every gloo group keeps threads that look for messages all the time: those of a
    whole session's tests took two fifths of the processors.
    """
    groups = Distributed()
    yield groups
    groups.close()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real corpora, from MEGAEGPT_DATA; tests that need it are skipped without it."""
    folder = os.environ.get("MEGAEGPT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set MEGAEGPT_DATA to the folder of real corpora to run this test")
    return Path(folder)
