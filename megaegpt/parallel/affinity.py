"""The cores and threads of a process on a CPU, alone or as a rank among others of its machine.

Left alone, every rank would have as many threads as the machine has cores, or, under ``torchrun``,
one; and threads of all ranks would move over all cores, away from caches and memory that they use.
So each rank is bound to neighbouring physical cores of its own and computes with a thread for each.
A process that has its cores to itself is not bound. None has more threads than a container's share
of the time lets run: the others would hold up all of them. GPU ranks are left alone: their threads
mostly wait.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megaegpt.errors import LaunchError

CHOICE = "MEGAEGPT_AFFINITY"
"""Environment variable: ``0`` leaves cores and threads to the system and the launcher."""

_OPENMP_PLACES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
"""By these the user says where threads run."""


@dataclass(frozen=True, order=True)
class Core:
    """A physical core; the order is that of the memory nearest to it."""

    node: int
    """Its NUMA node."""
    package: int
    cpus: tuple[int, ...]
    """Its hardware threads, of those that this process may use."""


def physical_cores(allowed: set[int], system: Path = Path("/sys/devices/system")) -> list[Core]:
    """The cores that ``allowed`` CPUs belong to, neighbours together; each CPU is a core of its own
    where Linux does not tell.

    Source: Documentation/admin-guide/cputopology.rst of Linux.
    """
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in system.glob("node/node[0-9]*")
        for cpu in _cpu_list(_read(folder / "cpulist"))
    }
    threads: dict[tuple[int, int, int], list[int]] = {}
    for cpu in sorted(allowed):
        topology = system / f"cpu/cpu{cpu}/topology"
        siblings = _cpu_list(_read(topology / "thread_siblings_list")) or [cpu]
        package = _read(topology / "physical_package_id")
        place = nodes.get(cpu, 0), int(package or 0), min(siblings)
        threads.setdefault(place, []).append(cpu)
    return sorted(Core(node, package, tuple(cpus)) for (node, package, _), cpus in threads.items())


def share_of_cores(cores: list[Core], place: int, ranks: int) -> list[Core]:
    """Consecutive cores of the rank ``place`` among ``ranks``, as many for each; none where there
    are fewer cores than ranks.
    """
    each = len(cores) // ranks
    first = place * len(cores) // ranks
    return cores[first : first + each]


def cpu_quota(group: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that a container may use; None: no limit is known.

    Source: Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst (v1)
    of Linux.
    """
    second = _read(group / "cpu.max").split()
    first = [_read(group / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    for words in (second, first):
        if len(words) == 2 and all(word.isdigit() for word in words):  # without one: max, or -1
            return int(words[0]) / int(words[1])
    return None


def limit_threads(processes: int = 1) -> None:
    """Let this process, which has the CPUs that it may use to itself, compute with no more threads
    than they have physical cores, and than a container's share of the time has CPUs. Fewer stay as
    they are, as does what ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` say.

    Args:
        processes: among which the container's time is divided.

    Raises:
        LaunchError: ``MEGAEGPT_AFFINITY`` has none of its values.
    """
    if not _chooses() or _threads_are_given():
        return
    threads = torch.get_num_threads()
    cores = threads
    if hasattr(os, "sched_getaffinity"):
        cores = len(physical_cores(os.sched_getaffinity(0)))
    if threads > (most := _most_threads(cores, processes)):
        torch.set_num_threads(most)


def bind_rank(store: dist.Store, rank: int, world_size: int, *, computes: bool = True) -> None:
    """Bind this process to its share of the cores that other ranks on its machine may use as well,
    whoever has started them, and set its number of threads. Collective among all ranks, before
    anything is computed.

    What ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` say of threads stays, as does a binding that
    differs from rank to rank, which is the launcher's.

    Args:
        store: of the rendezvous, which every rank has reached.
        rank: this process.
        world_size: number of ranks.
        computes: on the CPU; a rank that does not only says so.

    Raises:
        LaunchError: ``MEGAEGPT_AFFINITY`` has none of its values.
    """
    takes_part = _chooses() and computes and hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if takes_part else set()
    own = (machine(), _container(), _as_list(allowed))
    store.set(f"affinity/{rank}", "\n".join(own) if takes_part else "")
    if not takes_part:
        return
    places = [store.get(f"affinity/{other}").decode().split("\n") for other in range(world_size)]
    here = {n: place for n, place in enumerate(places) if place[0] == own[0]}
    processes = sum(place[1] == own[1] for place in here.values())
    sharers = [n for n, place in here.items() if place[2] == own[2]]
    others = {cpu for place in here.values() if place[2] != own[2] for cpu in _cpu_list(place[2])}
    if len(sharers) < 2 or others & allowed:
        limit_threads(processes)
        return
    cores = share_of_cores(physical_cores(allowed), sharers.index(rank), len(sharers))
    if cores and not any(os.environ.get(name) for name in _OPENMP_PLACES):
        with contextlib.suppress(OSError):  # forbidden in some sandboxes, and no more than speed
            os.sched_setaffinity(0, {cpu for core in cores for cpu in core.cpus})
    if not _threads_are_given():
        torch.set_num_threads(_most_threads(len(cores), processes))


def describe_threads() -> str:
    """With how many threads and on which CPUs this process computes."""
    threads = torch.get_num_threads()
    words = "1 thread" if threads == 1 else f"{threads} threads"
    if not hasattr(os, "sched_getaffinity"):
        return f"{words} a rank"
    allowed = os.sched_getaffinity(0)
    cores = len(physical_cores(allowed))
    named = "1 physical core" if cores == 1 else f"{cores} physical cores"
    return f"{words} a rank, rank 0's on {named} (CPUs {_as_list(allowed)})"


def _chooses() -> bool:
    """Whether cores and threads are chosen here."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "0", "1"):
        raise LaunchError(
            f"{CHOICE}={choice} is not known: 0 leaves cores and threads to the system, and unset "
            "each rank is bound to cores of its own"
        )
    return choice != "0"


def _most_threads(cores: int, processes: int) -> int:
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota / processes)))


def _threads_are_given() -> bool:
    """Whether the user has set a number of threads; ``torchrun`` sets 1 where there is none."""
    given = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)]
    if given != ["OMP_NUM_THREADS"] or "TORCHELASTIC_RUN_ID" not in os.environ:
        return bool(given)
    try:  # what the launcher itself was started with
        launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in launcher)


def machine() -> str:
    """What tells this machine from others."""
    return _read(Path("/proc/sys/kernel/random/boot_id")) or os.uname().nodename


def _container() -> str:
    """What is the same for processes of one container and differs from container to container of a
    machine: each has a name of its own, unless it has the machine's network, or its own groups.
    """
    try:
        groups = os.readlink("/proc/self/ns/cgroup")
    except OSError:
        groups = ""
    return f"{os.uname().nodename} {groups}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _cpu_list(text: str) -> list[int]:
    """``0-2,8`` -> 0, 1, 2, 8."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found += range(int(first), int(last or first) + 1)
    return found


def _as_list(cpus: set[int]) -> str:
    """The form that :func:`_cpu_list` reads."""
    parts: list[str] = []
    ordered = sorted(cpus)
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or ordered[end] != ordered[end - 1] + 1:
            run = ordered[start:end]
            parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            start = end
    return ",".join(parts)
