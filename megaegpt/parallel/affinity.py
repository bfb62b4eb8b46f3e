"""The cores and threads of a rank among others on the same machine's CPU.

Left alone, every rank would have as many threads as the machine has cores, or, under ``torchrun``,
one; and threads of all ranks would move over all cores, away from caches and memory that they use.
So each rank is bound to neighbouring physical cores of its own and computes with a thread for each.
GPU ranks are left alone: their threads mostly wait.
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

_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's, deepspeed's


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
    """CPUs' worth of time that a container (cgroup v2) may use; None: no limit is known."""
    words = _read(group / "cpu.max").split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    return int(words[0]) / int(words[1])


def bind_rank(store: dist.Store) -> None:
    """Bind this process, one of several on its machine, to its share of the cores, and set its
    number of threads. Collective among the ranks of the machine, before anything is computed.

    What ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` say of threads stays, as does a binding that
    differs from rank to rank, which is the launcher's. On a machine whose launcher does not say how
    many ranks it has, nothing is done.

    Raises:
        LaunchError: ``MEGAEGPT_AFFINITY`` has none of its values.
    """
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "0", "1"):
        raise LaunchError(
            f"{CHOICE}={choice} is not known: 0 leaves cores and threads to the system, and unset "
            "each rank is bound to cores of its own"
        )
    place, ranks = int(os.environ.get("LOCAL_RANK", "0")), _ranks_here()
    if choice == "0" or ranks < 2 or place >= ranks or not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    key = f"affinity/{_machine()}"
    store.set(f"{key}/{place}", _as_list(allowed))
    masks = {store.get(f"{key}/{other}").decode() for other in range(ranks)}
    if len(masks) > 1:
        return
    own = share_of_cores(physical_cores(allowed), place, ranks)
    if own and not any(os.environ.get(name) for name in _OPENMP_PLACES):
        with contextlib.suppress(OSError):  # forbidden in some sandboxes, and no more than speed
            os.sched_setaffinity(0, {cpu for core in own for cpu in core.cpus})
    if not _threads_are_given():
        quota = cpu_quota()
        most = len(own) if quota is None else int(quota / ranks)
        torch.set_num_threads(max(1, min(len(own), most)))


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


def _ranks_here() -> int:
    """Processes of this run on this machine; 1 where the launcher does not say."""
    for name in _LOCAL_SIZES:
        if (text := os.environ.get(name, "")).isdecimal():
            return int(text)
    return 1


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


def _machine() -> str:
    return _read(Path("/proc/sys/kernel/random/boot_id")) or os.uname().nodename


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
