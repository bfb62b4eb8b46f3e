"""The one place where a program's processes join, from the launcher's variables to their end."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megaegpt.errors import LaunchError, first_line
from megaegpt.parallel.affinity import bind_rank, limit_threads
from megaegpt.parallel.devices import local_device
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.launcher_variables import is_launched
from megaegpt.parallel.launcher_watch import end_with_launcher
from megaegpt.parallel.network import interface_to_others
from megaegpt.parallel.watch import RankWatch

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits in a step's collective before it takes the others to be stuck. A rank that
dies is noticed at once, by the rank watch; what one rank does for all while the others wait, such
as a download, has the longer time of :attr:`ProcessGrid.control_group`."""


@contextmanager
def joined_processes(
    tensor_parallel_size: int | None, context_parallel_size: int = 1
) -> Iterator[ProcessGrid]:
    """This process's place among those that ``deepspeed`` or ``torchrun`` started; inside, one
    rank's failure ends every rank, and so does the launcher's end.

    Without a launcher this process is a world of its own.

    Args:
        tensor_parallel_size: ranks a model is cut over; None: all of them.
        context_parallel_size: ranks that share samples in training.

    Raises:
        LaunchError: as for :func:`init_distributed`, :meth:`ProcessGrid.create` and
            :class:`RankWatch`.
    """
    joins = not dist.is_initialized()
    device = init_distributed() if joins else local_device()
    tp_size = dist.get_world_size() if tensor_parallel_size is None else tensor_parallel_size
    grid = ProcessGrid.create(tp_size, device, cp_size=context_parallel_size)
    try:
        with RankWatch(grid):
            yield grid
    except BaseException:
        if joins and grid.world_size > 1:  # others may be in the middle of a collective
            joins = False
        raise
    finally:
        if joins:
            dist.destroy_process_group()


def init_distributed() -> torch.device:
    """Join the processes that a launcher started, or be the only one; returns the device to use.

    Call it once, before :meth:`ProcessGrid.create`.

    Raises:
        LaunchError: the launcher's variables are incomplete or contradict each other, the address
            cannot be used, ranks have devices of other types, or as for
            :func:`~megaegpt.parallel.devices.local_device` and
            :func:`~megaegpt.parallel.affinity.bind_rank`.
    """
    launched = is_launched()
    device = local_device()
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed.c10d_logger"
    )
    # Both back-ends: what ranks agree on outside of a step is talked about without the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not launched:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it even so
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if device.type == "cpu":
            limit_threads()
        return device
    end_with_launcher()
    try:
        found, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = _of_this_attempt(found)
        _check_device_type(store, rank, device)
        bind_rank(store, rank, world_size, computes=device.type == "cpu")
        if interface := interface_to_others(store, world_size):
            # Gloo would take the network that this machine's own name stands for: on Debian its
            # loopback address, on a cluster perhaps a network for its administration.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LaunchError(_describe_unreachable(error)) from None
    return device


def _check_device_type(store: dist.Store, rank: int, device: torch.device) -> None:
    """Raises:
    LaunchError: the first rank has a device of another type, with which this one cannot talk.
    """
    if rank == 0:
        store.set("device_type", device.type)
    elif (first := store.get("device_type").decode()) != device.type:
        raise LaunchError(
            f"rank {rank}, on {platform.node()}, computes on {device.type} and rank 0 on {first}: "
            f"all ranks need devices of one type (MEGAEGPT_DEVICE=cpu, on each, takes none)"
        )


def _describe_unreachable(error: Exception) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = str(error)
    if "EADDRINUSE" in text or "already in use" in text:
        return (
            f"{address} is in use by another program or run: choose another port, "
            "`deepspeed --master_port N` or `torchrun --master_port N`"
        )
    return f"the processes cannot meet at {address} (MASTER_ADDR, MASTER_PORT): {first_line(error)}"


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """torchrun keeps its store when it starts all ranks again, and in it the addresses of ranks
    that are no more. On one machine attempts have numbers that all ranks know.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
