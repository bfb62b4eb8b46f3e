"""How processes join: the launcher's variables in every combination."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaegpt.environment import is_other_rank
from megaegpt.errors import LaunchError
from megaegpt.parallel import affinity, launch
from megaegpt.parallel.launcher_variables import is_launched, started_processes, without_launcher

_WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_WHOLE, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "launched"),
    [
        (_WHOLE, True),
        ({**_WHOLE, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, True),
        ({}, False),
        ({"RANK": "", "WORLD_SIZE": ""}, False),
        ({"MASTER_ADDR": "node", "MASTER_PORT": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({**_WHOLE, "OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_whole_and_absent_variables_are_understood(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], launched: bool
) -> None:
    _set(monkeypatch, variables)
    assert is_launched() == launched


def test_a_process_of_its_own_is_given_no_rank_of_this_one() -> None:
    assert without_launcher({**_WHOLE, "PATH": "/bin"}) == {"PATH": "/bin"}


def test_empty_variables_are_gone_for_those_who_read_them_as_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set(monkeypatch, dict.fromkeys(_WHOLE, ""))
    assert not is_launched()
    assert not set(_WHOLE) & set(os.environ)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "0"}, "RANK=0 set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start by"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 set, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({**_WHOLE, "MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({**_WHOLE, "RANK": "2"}, "RANK=2 is not among the 2 ranks"),
        ({**_WHOLE, "RANK": "-1"}, "RANK=-1 is not a number"),
        ({**_WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
        ({**_WHOLE, "WORLD_SIZE": "9" * 30}, "is not a number"),
        ({**_WHOLE, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        ({**_WHOLE, "MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({**_WHOLE, "LOCAL_RANK": ""}, "LOCAL_RANK is not set"),
        ({**_WHOLE, "LOCAL_RANK": "x"}, "LOCAL_RANK=x is not a number"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: mpirun sets none"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4: mpirun sets none"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8: srun sets none"),
    ],
)
def test_half_set_and_senseless_variables_are_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], told: str
) -> None:
    _set(monkeypatch, variables)
    with pytest.raises(LaunchError) as raised:
        is_launched()
    assert told in str(raised.value)


@pytest.mark.parametrize("text", ["x", "-1", "0", "1.5"])
def test_a_senseless_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(LaunchError, match=f"WORLD_SIZE={text}"):
        started_processes()


def test_a_rank_left_over_in_a_shell_does_not_silence_the_only_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not is_other_rank()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_other_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_other_rank()
    _set(monkeypatch, _WHOLE)
    assert is_other_rank()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_process_groups_have_a_timeout_and_a_gpus_device(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    device = torch.device(kind, 0)
    made = _join(monkeypatch, device)
    assert made["timeout"] == timedelta(minutes=10)
    assert made["device_id"] == (device if kind == "cuda" else None)


@pytest.mark.parametrize(("given", "used"), [(None, "ib0"), ("eth3", "eth3")])
def test_gloo_takes_the_network_to_the_other_machines_unless_one_is_given(
    monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # to have it restored
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    if given is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    monkeypatch.setattr(launch, "interface_to_others", lambda store, world_size: "ib0")
    assert _join(monkeypatch, torch.device("cpu"))["GLOO_SOCKET_IFNAME"] == used


def test_a_rank_whose_device_is_of_another_type_than_the_firsts_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(LaunchError, match=r"rank 1, on .*, computes on cpu and rank 0 on cuda: "):
        _join(monkeypatch, torch.device("cpu"), rank=1, first="cuda")
    _join(monkeypatch, torch.device("cpu"), rank=1, first="cpu")


def _join(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, rank: int = 0, first: str = ""
) -> dict[str, Any]:
    """What the process group is made with, in options and environment; ``first``: the device type
    of rank 0, where that is another one.
    """
    made: dict[str, Any] = {}

    def init_process_group(backend: str, **options: Any) -> None:
        made.update(options, GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME"))

    store = dist.HashStore()
    if rank:
        store.set("device_type", first)
        for of_all_ranks in ("bind_rank", "interface_to_others"):
            monkeypatch.setattr(launch, of_all_ranks, lambda *_, **__: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(launch, "is_launched", lambda: True)
    monkeypatch.setattr(launch, "local_device", lambda: device)
    monkeypatch.setattr(launch, "end_with_launcher", lambda: None)
    monkeypatch.setattr(launch.dist, "rendezvous", lambda *_, **__: iter([(store, rank, rank + 1)]))
    monkeypatch.setattr(launch.dist, "init_process_group", init_process_group)
    assert launch.init_distributed() == device
    return made


def test_a_single_process_has_no_more_threads_than_its_containers_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", affinity.CHOICE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(affinity, "cpu_quota", lambda: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    launch.init_distributed()
    assert threads == [1]
