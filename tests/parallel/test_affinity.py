"""Ranks of one machine share its cores: read from folders like Linux's, on any machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megaegpt.errors import LaunchError
from megaegpt.parallel import affinity
from megaegpt.parallel.affinity import (
    Core,
    bind_rank,
    cpu_quota,
    describe_threads,
    limit_threads,
    physical_cores,
    share_of_cores,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Path]:
    """Makes the topology of nodes with so many cores of two hardware threads, numbered as Linux
    does: first one thread of every core of every node, which alternate, then the others.
    """

    def make(nodes: int, cores: int) -> Path:
        total = nodes * cores
        for cpu in range(2 * total):
            core = cpu % total
            folder = tmp_path / f"cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{core},{core + total}\n")
            (folder / "physical_package_id").write_text(f"{core % nodes}\n")
        for node in range(nodes):
            folder = tmp_path / f"node/node{node}"
            folder.mkdir(parents=True)
            cpus = [cpu for cpu in range(2 * total) if cpu % total % nodes == node]
            (folder / "cpulist").write_text(",".join(map(str, cpus)) + "\n")
        return tmp_path

    return make


def test_hardware_threads_are_one_core_and_neighbours_are_of_one_node(
    machine: Callable[..., Path],
) -> None:
    cores = physical_cores(set(range(16)), machine(nodes=2, cores=4))
    assert [core.node for core in cores] == [0] * 4 + [1] * 4
    assert [core.cpus for core in cores[:5]] == [(0, 8), (2, 10), (4, 12), (6, 14), (1, 9)]


def test_only_cpus_that_the_process_may_use_count(machine: Callable[..., Path]) -> None:
    cores = physical_cores({1, 2, 10}, machine(nodes=2, cores=4))
    assert cores == [Core(0, 0, (2, 10)), Core(1, 1, (1,))]


def test_without_a_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    assert physical_cores({3, 5}, tmp_path) == [Core(0, 0, (3,)), Core(0, 0, (5,))]


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (7, 2, [[0, 1, 2], [3, 4, 5]]),
        (2, 4, [[], [], [], []]),
    ],
)
def test_ranks_have_as_many_cores_and_none_twice(
    cores: int, ranks: int, shares: list[list[int]]
) -> None:
    all_of_them = [Core(0, 0, (number,)) for number in range(cores)]
    for place, expected in enumerate(shares):
        own = share_of_cores(all_of_them, place, ranks)
        assert [core.cpus[0] for core in own] == expected


@pytest.mark.parametrize(
    ("text", "quota"), [("400000 100000\n", 4.0), ("max 100000\n", None), ("", None)]
)
def test_a_containers_share_of_the_time_is_read(
    tmp_path: Path, text: str, quota: float | None
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path) == quota
    assert cpu_quota(tmp_path / "absent") is None


@pytest.mark.parametrize(("text", "limit"), [("150000\n", 1.5), ("-1\n", None)])
def test_an_older_containers_share_is_read_from_two_files(
    tmp_path: Path, text: str, limit: float | None
) -> None:
    """Version 1 of Linux's control groups."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(text)
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == limit


class Process:
    """Rank 1 of 2 on a machine of 4 cores, which torch would use with their hardware threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bound: set[int] | None = None
        self.threads: int | None = None
        self.store = dist.HashStore()
        cores = [Core(0, 0, (cpu, cpu + 4)) for cpu in range(4)]
        monkeypatch.setattr(affinity, "physical_cores", lambda _: cores)
        monkeypatch.setattr(affinity, "cpu_quota", lambda: None)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: setattr(self, "bound", cpus))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))
        for name in (affinity.CHOICE, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND"):
            monkeypatch.delenv(name, raising=False)
        for name in ("TORCHELASTIC_RUN_ID", "OMP_PLACES", "KMP_AFFINITY"):
            monkeypatch.delenv(name, raising=False)
        bind_rank(self.store, 0, 1)
        self._here = self.store.get("affinity/0").decode().split("\n")
        self.bound = self.threads = None

    def bind(self, *neighbours: str, rank: int = 1) -> tuple[set[int] | None, int | None]:
        """With neighbours, which are the other ranks in order (one that may use the same CPUs, if
        none is given): the CPUs and threads that are set.
        """
        others = list(neighbours or (self.place("0-7"),))
        for other, place in enumerate([*others[:rank], None, *others[rank:]]):
            if place is not None:
                self.store.set(f"affinity/{other}", place)
        bind_rank(self.store, rank, len(others) + 1)
        return self.bound, self.threads

    def place(self, cpus: str, machine: str | None = None, container: str | None = None) -> str:
        """What a rank says of itself that may use these CPUs, here if nothing else is given."""
        return "\n".join([machine or self._here[0], container or self._here[1], cpus])


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(monkeypatch)


HALF = {2, 3, 6, 7}


@linux
def test_a_rank_has_its_cores_and_a_thread_for_each(process: Process) -> None:
    assert process.bind() == (HALF, 2)


@linux
def test_ranks_of_several_launchers_on_one_machine_have_cores_of_their_own(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers with two ranks each, in both of which there is a local rank 0 and 1."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        places = [process.place("0-7", container="another"), process.place("0-7")]
        others = [places[(other // 2) == (rank // 2)] for other in range(4) if other != rank]
        assert process.bind(*others, rank=rank) == ({rank, rank + 4}, 1)


@linux
def test_a_containers_time_is_divided_among_its_own_ranks(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "cpu_quota", lambda: 2.0)
    assert process.bind(process.place("0-7", container="another")) == (HALF, 2)
    assert process.bind(process.place("0-7")) == (HALF, 1)


@linux
def test_a_rank_that_is_alone_on_its_machine_has_all_cores(process: Process) -> None:
    assert process.bind(process.place("0-7", machine="another")) == (None, 4)


@linux
def test_ranks_on_a_gpu_take_no_cores(process: Process) -> None:
    assert process.bind("") == (None, 4)
    bind_rank(process.store, 2, 3, computes=False)
    assert process.store.get("affinity/2") == b""


@linux
@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MEGAEGPT_AFFINITY", "0", (None, None)),
        ("OMP_NUM_THREADS", "1", (HALF, None)),
        ("MKL_NUM_THREADS", "1", (HALF, None)),
        ("OMP_PROC_BIND", "close", (None, 2)),
    ],
)
def test_what_the_user_has_set_stays(
    process: Process,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    expected: tuple[set[int] | None, int | None],
) -> None:
    monkeypatch.setenv(variable, value)
    assert process.bind() == expected


@linux
def test_ranks_that_the_launcher_has_bound_stay_so(process: Process) -> None:
    assert process.bind(process.place("8-15")) == (None, 4)
    assert process.bind(process.place("0-3")) == (None, 4)  # which have some of the same cores


@linux
def test_where_cores_are_too_few_ranks_have_one_thread_and_move(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "physical_cores", lambda _: [Core(0, 0, (0,))])
    assert process.bind() == (None, 1)


@linux
def test_no_more_threads_than_a_containers_time(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "cpu_quota", lambda: 2.5)
    assert process.bind() == (HALF, 1)


@linux
@pytest.mark.parametrize(("given", "threads"), [({}, 2), ({"OMP_NUM_THREADS": "1"}, None)])
def test_torchruns_own_number_of_threads_is_not_the_users(
    process: Process,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    threads: int | None,
) -> None:
    """The launcher's environment, not that of its children, says what it was started with."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with subprocess.Popen([shutil.which("sleep") or "sleep", "60"], env=given) as launcher:
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        assert process.bind() == (HALF, threads)
        launcher.kill()


@linux
@pytest.mark.parametrize(
    ("quota", "variable", "threads"),
    [
        (None, None, 4),
        (2.5, None, 2),
        (0.5, None, 1),
        (8.0, None, 4),
        (2.0, "OMP_NUM_THREADS", None),
        (2.0, "MEGAEGPT_AFFINITY", None),
    ],
)
def test_a_single_process_has_no_more_threads_than_cores_and_time(
    process: Process,
    monkeypatch: pytest.MonkeyPatch,
    quota: float | None,
    variable: str | None,
    threads: int | None,
) -> None:
    monkeypatch.setattr(affinity, "cpu_quota", lambda: quota)
    if variable is not None:
        monkeypatch.setenv(variable, "0")
    limit_threads()
    assert (process.bound, process.threads) == (None, threads)


@linux
def test_fewer_threads_stay(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    limit_threads()
    assert process.threads is None


@linux
def test_an_unknown_choice_is_refused(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(affinity.CHOICE, "close")
    for choose in (process.bind, limit_threads):
        with pytest.raises(LaunchError, match="MEGAEGPT_AFFINITY=close is not known"):
            choose()


@linux
def test_one_line_says_what_a_rank_computes_with(process: Process) -> None:
    assert "on 4 physical cores (CPUs 0-7)" in describe_threads()
