"""The processes of a program that a launcher started, from joining them to leaving them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.watch import RankWatch
from megaegpt.training.engine import init_distributed


@contextmanager
def joined_processes(tensor_parallel_size: int) -> Iterator[ProcessGrid]:
    """This process's place among all; inside, one rank's failure ends every rank.

    Raises:
        LaunchError: as :func:`init_distributed`, :meth:`ProcessGrid.create` and
            :class:`RankWatch`.
    """
    device = init_distributed()
    grid = ProcessGrid.create(tensor_parallel_size, device)
    with RankWatch(grid):
        yield grid
    dist.destroy_process_group()
