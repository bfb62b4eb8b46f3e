"""Which of a machine's networks leads to the other machines of a run."""

from __future__ import annotations

import ipaddress
import os
import socket

import torch.distributed as dist


def interface_to_others(store: dist.Store, world_size: int) -> str | None:
    """The network interface over which this machine reaches the others; None: there are none.

    It is the one with the route to MASTER_ADDR. On the machine which that names, it is the one with
    the route to another machine, since its own name may be one for its loopback address. Collective
    over all ranks.

    Args:
        store: of the rendezvous, which every rank has reached.
        world_size: number of ranks.
    """
    store = dist.PrefixStore("network", store)
    own = address_towards(os.environ["MASTER_ADDR"])
    if own is not None and not _is_loopback(own):
        store.set("address", own)
    if store.add("ranks", 1) >= world_size:
        store.set("complete", "")
    store.wait(["complete"])
    if not store.check(["address"]):
        return None
    if own is None or _is_loopback(own):
        own = address_towards(store.get("address").decode())
    return None if own is None else interface_of(own)


def address_towards(host: str) -> str | None:
    """The address of this machine from which it reaches ``host``; None where there is no route."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has ``address``."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
