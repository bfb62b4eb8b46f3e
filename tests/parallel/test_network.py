"""The network over which machines reach each other is found without a variable set by hand."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch.distributed as dist

from megaegpt.parallel import network
from megaegpt.parallel.network import address_towards, interface_of, interface_to_others

ROUTES = {
    # On node-01, where that name is one for the loopback address (Debian and Ubuntu write it so).
    "debian": {"node-01": "127.0.1.1", "10.1.0.2": "10.1.0.1"},
    # Where the name is one for its address in a network.
    "other": {"node-01": "10.1.0.1", "10.1.0.2": "10.1.0.1"},
    "node-02": {"node-01": "10.1.0.2"},
    "cut off": {"10.1.0.2": "10.1.0.3"},
}
INTERFACES = {"10.1.0.1": "ib0", "10.1.0.2": "eth1", "10.1.0.3": "eth2", "127.0.1.1": "lo"}


def _interfaces(monkeypatch: pytest.MonkeyPatch, machines: list[str]) -> list[str | None]:
    """What each rank finds; a thread with the routes of a machine stands for a rank."""
    store, here = dist.HashStore(), threading.local()
    monkeypatch.setenv("MASTER_ADDR", "node-01")
    monkeypatch.setattr(network, "address_towards", lambda host: ROUTES[here.machine].get(host))
    monkeypatch.setattr(network, "interface_of", INTERFACES.get)

    def rank(machine: str) -> str | None:
        here.machine = machine
        return interface_to_others(store, len(machines))

    with ThreadPoolExecutor(len(machines)) as pool:
        return list(pool.map(rank, machines))


@pytest.mark.parametrize("first", ["debian", "other"])
def test_every_rank_takes_the_interface_that_leads_to_the_other_machine(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    machines = [first, first, "node-02", "node-02", "cut off"]
    assert _interfaces(monkeypatch, machines) == ["ib0", "ib0", "eth1", "eth1", "eth2"]


def test_on_one_machine_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _interfaces(monkeypatch, ["debian"] * 3) == [None] * 3


def test_an_interface_is_found_by_each_of_its_addresses() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and "%" not in entry.address:
                assert interface_of(entry.address) == name
    assert interface_of("203.0.113.77") is None


def test_a_machine_reaches_itself_from_the_address_it_is_asked_for() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") is None
