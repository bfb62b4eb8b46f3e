"""The environment variables in which a launcher describes its processes. Imports no torch.

``torchrun``, ``deepspeed`` and a job script under Slurm set RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. Half of them, left over in a shell or from another program, must not
start a run that waits for ranks that never come.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megaegpt.environment import is_other_rank
from megaegpt.errors import LaunchError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ALL_NAMES = (*_NAMES, "LOCAL_RANK")
_COUNTED_BY_OTHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""Processes that were started together by programs that set none of the variables."""


def is_launched() -> bool:
    """Whether a launcher describes the processes in the environment, which it must do in full.

    Raises:
        LaunchError: it does so in part, or what it says contradicts itself; or several processes
            were started by a program that does not.
    """
    for name in _ALL_NAMES:
        if os.environ.get(name) == "":  # means unset; DeepSpeed would read it as a number
            del os.environ[name]
    given = [name for name in _NAMES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        _refuse_other_launchers()
        return False
    if missing := [name for name in _NAMES if name not in given]:
        raise LaunchError(
            f"{', '.join(f'{name}={os.environ[name]}' for name in given)} set, but not "
            f"{', '.join(missing)}: start by `torchrun` or `deepspeed`, which set all of them, or "
            "unset them all to run one process"
        )
    rank, world_size, port = number("RANK"), number("WORLD_SIZE"), number("MASTER_PORT")
    if not 0 <= rank < world_size:
        raise LaunchError(f"RANK={rank} is not among the {world_size} ranks of WORLD_SIZE")
    if not 0 < port < 65536:
        raise LaunchError(f"MASTER_PORT={port} is no port: ports are 1 to 65535")
    if not os.environ.get("LOCAL_RANK"):
        if world_size > 1:
            raise LaunchError("LOCAL_RANK is not set: start by `torchrun` or `deepspeed`")
        os.environ["LOCAL_RANK"] = "0"
    number("LOCAL_RANK")
    return True


def _refuse_other_launchers() -> None:
    for name, program in _COUNTED_BY_OTHERS.items():
        if os.environ.get(name, "1") not in ("", "1"):
            raise LaunchError(
                f"{name}={os.environ[name]}: {program} sets none of the variables that torch "
                "reads; start by `torchrun` or `deepspeed`, or as launchers/slurm/pretrain.sbatch"
            )


def started_processes() -> int | None:
    """How many processes a launcher started; None without one.

    Raises:
        LaunchError: WORLD_SIZE is not a number of processes.
    """
    if not os.environ.get("WORLD_SIZE"):
        return None
    if (world_size := number("WORLD_SIZE")) < 1:
        raise LaunchError(f"WORLD_SIZE={world_size}: there is at least one process")
    return world_size


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` as a process of its own needs it that none of these ranks is to meet.

    A process that is alone has a LOCAL_RANK as well, once it has trained.
    """
    return {name: text for name, text in environment.items() if name not in _ALL_NAMES}


def is_main_process() -> bool:
    """Whether this is the one that prints, before there is a process group."""
    return not is_other_rank()


def number(name: str) -> int:
    """The value of a variable that is a number of processes, a rank or a port.

    Raises:
        LaunchError: it is none.
    """
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise LaunchError(f"{name}={text} is not a number: launchers set it, leave it to them")
    return int(text)
