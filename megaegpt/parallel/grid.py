"""Who am I in tensor parallel x context parallel x data parallel.

Ranks of one tensor-parallel group are neighbours, and so are the groups that share samples:
``rank = (dp_rank * cp_size + cp_rank) * tp_size + tp_rank``. The frequent, latency-bound TP traffic
stays inside a node, then what context-parallel ranks send in every layer, and gradients, which are
sent once a step, go furthest.

For gradients and optimizer states a context-parallel rank is one more *replica* of the weights, as
a data-parallel one is: it has all tokens of other samples or other tokens of the same ones, and
what a step needs is the sum over them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megaegpt.errors import LaunchError

_CONTROL_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ProcessGrid:
    """This process's place. Groups are ``None`` where the size is 1: nothing communicates there."""

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    """Which samples are this rank's."""
    dp_size: int = 1
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    cp_rank: int = 0
    """Which tokens of them."""
    cp_size: int = 1
    cp_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    """Ranks that hold the same weights, over data and context parallelism: gradients are summed,
    and ZeRO partitions, over them."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control_group: dist.ProcessGroup | None = None
    """All ranks, on the CPU: what they agree on outside of a step. A rank may wait long there for
    one that downloads, converts or writes."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.replica_rank * self.tp_size + self.tp_rank

    @property
    def replica_rank(self) -> int:
        """This rank's place in :attr:`replica_group`."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def replica_size(self) -> int:
        """Ranks that hold the same weights."""
        return self.dp_size * self.cp_size

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.replica_size * self.tp_size

    @property
    def is_main(self) -> bool:
        """The one rank that prints and publishes."""
        return self.rank == 0

    @staticmethod
    def create(
        tp_size: int, device: torch.device | None = None, *, cp_size: int = 1
    ) -> ProcessGrid:
        """Cut the initialised default process group into tp x cp x dp; collective over all ranks.

        Raises:
            LaunchError: a size is below 1, or the number of processes is not a multiple of both
                together.
        """
        device = device or torch.device("cpu")
        world = dist.get_world_size() if dist.is_initialized() else 1
        _check_sizes(world, tp_size, cp_size)
        if not dist.is_initialized():
            return ProcessGrid(device=device)
        dp_size = world // (tp_size * cp_size)
        mesh = init_device_mesh(
            device.type, (dp_size, cp_size, tp_size), mesh_dim_names=("dp", "cp", "tp")
        )
        return ProcessGrid(
            tp_rank=mesh.get_local_rank("tp"),
            tp_size=tp_size,
            dp_rank=mesh.get_local_rank("dp"),
            dp_size=dp_size,
            tp_group=mesh.get_group("tp") if tp_size > 1 else None,
            dp_group=mesh.get_group("dp") if dp_size > 1 else None,
            cp_rank=mesh.get_local_rank("cp"),
            cp_size=cp_size,
            cp_group=mesh.get_group("cp") if cp_size > 1 else None,
            replica_group=_replica_group(mesh) if dp_size * cp_size > 1 else None,
            device=device,
            control_group=dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
            if world > 1
            else None,
        )


def _check_sizes(world: int, tp_size: int, cp_size: int) -> None:
    for key, size in (("tensor", tp_size), ("context", cp_size)):
        if size < 1:
            raise LaunchError(f"parallel.{key}_parallel_size={size} must be at least 1")
    size, groups = tp_size * cp_size, "tensor-parallel"
    sizes = f"parallel.tensor_parallel_size={tp_size}"
    multiple = "parallel.tensor_parallel_size"
    if cp_size > 1:
        groups = "tensor- and context-parallel"
        sizes += f" x parallel.context_parallel_size={cp_size}"
        multiple += " x parallel.context_parallel_size"
    if world < size:
        raise LaunchError(
            f"{sizes} needs {size} processes, not {world}: start with "
            f"`torchrun --nproc_per_node {size}` or `deepspeed --num_gpus {size}`"
        )
    if world % size:
        raise LaunchError(
            f"{world} processes cannot be divided into {groups} groups of {size}: start a multiple "
            f"of {multiple}"
        )


def _replica_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Of the ranks with this one's place among tensor-parallel ranks."""
    if mesh["cp"].size() == 1:
        return mesh.get_group("dp")
    if mesh["dp"].size() == 1:
        return mesh.get_group("cp")
    return mesh["dp", "cp"]._flatten("replica").get_group()


class DeepSpeedMpu:
    """The methods DeepSpeed expects of its ``mpu`` argument, over one :class:`ProcessGrid`.

    Replicas of the weights are what it calls data-parallel ranks. It wants real groups where the
    size is 1 too, so they are made here. This class must never define
    ``initialize_sequence_parallel``: ZeRO would then take the grid to have no tensor-parallel
    group.
    """

    def __init__(self, grid: ProcessGrid) -> None:
        self._grid = grid
        alone = [dist.new_group([rank]) for rank in range(grid.world_size)][grid.rank]
        self._tp_group = grid.tp_group or alone
        self._replica_group = grid.replica_group or alone

    def get_model_parallel_rank(self) -> int:
        return self._grid.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tp_group

    def get_data_parallel_rank(self) -> int:
        return self._grid.replica_rank

    def get_data_parallel_world_size(self) -> int:
        return self._grid.replica_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._replica_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._grid.replica_rank * self._grid.tp_size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(self._grid.tp_rank, self._grid.world_size, self._grid.tp_size))
