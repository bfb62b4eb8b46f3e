"""Who am I in tensor parallel x data parallel.

Ranks of one tensor-parallel group are neighbours: ``rank = dp_rank * tp_size + tp_rank``, so that
the frequent, latency-bound TP traffic stays inside a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megaegpt.errors import LaunchError

_CONTROL_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ProcessGrid:
    """This process's place. Groups are ``None`` where the size is 1: nothing communicates there."""

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control_group: dist.ProcessGroup | None = None
    """All ranks, on the CPU: what they agree on outside of a step. A rank may wait long there for
    one that downloads, converts or writes."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.tp_size * self.dp_size

    @property
    def is_main(self) -> bool:
        """The one rank that prints and publishes."""
        return self.rank == 0

    @staticmethod
    def create(tp_size: int, device: torch.device | None = None) -> ProcessGrid:
        """Cut the initialised default process group into tp x dp; collective over all ranks.

        Raises:
            LaunchError: ``tp_size`` is below 1, or the number of processes is not a multiple of it.
        """
        device = device or torch.device("cpu")
        world = dist.get_world_size() if dist.is_initialized() else 1
        if tp_size < 1:
            raise LaunchError(f"parallel.tensor_parallel_size={tp_size} must be at least 1")
        if world < tp_size:
            raise LaunchError(
                f"parallel.tensor_parallel_size={tp_size} needs {tp_size} processes, not {world}: "
                f"start with `torchrun --nproc_per_node {tp_size}` or "
                f"`deepspeed --num_gpus {tp_size}`"
            )
        if world % tp_size:
            raise LaunchError(
                f"{world} processes cannot be divided into tensor-parallel groups of {tp_size}: "
                "start a multiple of parallel.tensor_parallel_size"
            )
        if not dist.is_initialized():
            return ProcessGrid(device=device)
        mesh = init_device_mesh(
            device.type, (world // tp_size, tp_size), mesh_dim_names=("dp", "tp")
        )
        return ProcessGrid(
            tp_rank=mesh.get_local_rank("tp"),
            tp_size=tp_size,
            dp_rank=mesh.get_local_rank("dp"),
            dp_size=world // tp_size,
            tp_group=mesh.get_group("tp") if tp_size > 1 else None,
            dp_group=mesh.get_group("dp") if world > tp_size else None,
            device=device,
            control_group=dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
            if world > 1
            else None,
        )


class DeepSpeedMpu:
    """The methods DeepSpeed expects of its ``mpu`` argument, over one :class:`ProcessGrid`.

    DeepSpeed wants real groups where the size is 1 too, so they are made here. It must never define
    ``initialize_sequence_parallel``: ZeRO would then take the grid to have no tensor-parallel
        group.
    """

    def __init__(self, grid: ProcessGrid) -> None:
        self._grid = grid
        alone = [dist.new_group([rank]) for rank in range(grid.world_size)][grid.rank]
        self._tp_group = grid.tp_group or alone
        self._dp_group = grid.dp_group or alone

    def get_model_parallel_rank(self) -> int:
        return self._grid.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tp_group

    def get_data_parallel_rank(self) -> int:
        return self._grid.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._grid.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._dp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._grid.dp_rank * self._grid.tp_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(self._grid.tp_rank, self._grid.world_size, self._grid.tp_size))
