"""What the ranks of several nodes measure together, and what is expected of it.

A part is measured by every rank of a process group that was made for it, and judged by the first
rank from what all of them found. On a CPU the same code runs at small sizes.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megaegpt.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megaegpt.model.build import build_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import all_gather_object, all_reduce_max, broadcast_object
from megaegpt.planning.hardware import accelerator_of
from megaegpt.training.logging.metrics import device_name
from tools.benchmarks.checklist import Checklist

_LEAST_SHARE = 0.5
"""Of the data sheet's bandwidth that the largest sum should reach."""
_SLOWEST_AGREEMENT = 0.020
"""Seconds that an agreement of all ranks may take, which is asked for once a step."""
_LOSS_TOLERANCE = 1e-4
"""Relative difference of the losses of a step in fp32, over other sums in another order."""
_LEAST_SCALING = 0.85
"""Share of a node's speed per GPU that should be left over all nodes."""
_STEPS = 5


@dataclass(frozen=True)
class Place:
    """Where a rank of the benchmark is."""

    grid: ProcessGrid
    """One of data-parallel ranks alone, over the ranks that take part."""
    per_node: int
    """Ranks of a node."""
    all_ranks: int
    """Those that take no part among them."""
    on_gpu: bool

    @property
    def nodes(self) -> int:
        """Among the ranks that take part."""
        return self.grid.world_size // self.per_node


@dataclass(frozen=True)
class Part:
    """One thing that is measured and judged."""

    name: str
    measure: Callable[[Place], Any]
    """On each rank of a process group of its own; its result is written as JSON."""
    judge: Callable[[Checklist, dict[str, list[Any]]], None]
    """From the results by part so far, each a list by rank."""
    minutes: float
    """After which it is given up."""
    one_node: bool = False
    """Only the ranks of the first node take part."""


# -- who is there ---------------------------------------------------------------------------------


def measure_groups(place: Place) -> dict[str, Any]:
    """This rank's machine and device, and sums over the groups that training has."""
    grid, rank = place.grid, place.grid.rank
    world, node = grid.world_size, rank // place.per_node
    nodes = [
        dist.new_group([n * place.per_node + r for r in range(place.per_node)])
        for n in range(place.nodes)
    ]
    across = [dist.new_group(list(range(r, world, place.per_node))) for r in range(place.per_node)]
    groups = {
        "all ranks": (None, range(world)),
        "this node": (nodes[node], range(node * place.per_node, (node + 1) * place.per_node)),
        "across nodes": (
            across[rank % place.per_node],
            range(rank % place.per_node, world, place.per_node),
        ),
    }
    wrong = []
    devices = [torch.device("cpu"), *([grid.device] if place.on_gpu else [])]
    for (name, (group, members)), device in itertools.product(groups.items(), devices):
        total = torch.tensor([float(rank)], device=device)
        dist.all_reduce(total, group=group)
        if total.item() != sum(members):
            wrong.append(f"{name} on {device.type}: {total.item()}, not {sum(members)}")
    if all_gather_object(rank, grid) != list(range(world)):
        wrong.append("objects of all ranks are not in the order of ranks")
    if broadcast_object(lambda: "rank 0's", grid) != "rank 0's":
        wrong.append("rank 0's object has not arrived")
    return {
        "host": socket.gethostname(),
        "device": str(torch.cuda.get_device_properties(grid.device).uuid) if place.on_gpu else "",
        "interface": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if place.on_gpu else "",
        "torch": torch.__version__,
        "wrong": wrong,
        "nodes": place.nodes,
        "on_gpu": place.on_gpu,
    }


def judge_groups(checklist: Checklist, found: dict[str, list[Any]]) -> None:
    """Nodes in blocks of ranks, a GPU for each, one build of torch and of NCCL, and right sums."""
    ranks = found["groups"]
    hosts = [rank["host"] for rank in ranks]
    blocks = [host for host, _ in itertools.groupby(hosts)]
    whole = len(blocks) == len(set(blocks))
    checklist.note("ranks of a node are neighbours", ", ".join(blocks), "each host once", whole)
    if ranks[0]["on_gpu"]:
        distinct = len({(rank["host"], rank["device"]) for rank in ranks})
        checklist.note("GPUs in use", str(distinct), str(len(ranks)), distinct == len(ranks))
    for key in ("torch", "nccl") if ranks[0]["on_gpu"] else ("torch",):
        versions = sorted({rank[key] for rank in ranks})
        checklist.note(f"builds of {key}", ", ".join(versions), "one", len(versions) == 1)
    wrong = [f"rank {n}: {w}" for n, rank in enumerate(ranks) for w in rank["wrong"]]
    checklist.note("sums over groups", "; ".join(wrong) or "right", "right", not wrong)


# -- what the connections carry -------------------------------------------------------------------


def measure_bandwidth(place: Place) -> dict[str, Any]:
    """Seconds of a sum by the ranks that take part in it and by its bytes."""
    grid, rank = place.grid, place.grid.rank
    node = rank // place.per_node
    own_node = [
        dist.new_group([n * place.per_node + r for r in range(place.per_node)])
        for n in range(place.nodes)
    ][node]
    across = [
        dist.new_group(list(range(r, grid.world_size, place.per_node)))
        for r in range(place.per_node)
    ][rank % place.per_node]
    sizes = [2**n for n in range(10, 31, 4)] + [2**30] if place.on_gpu else [2**10, 2**14]
    seconds = {}
    for name, group, count in (
        ("all ranks", None, grid.world_size),
        ("a node", own_node, place.per_node),
        ("one rank of each node", across, place.nodes),
    ):
        if count > 1:
            seconds[name] = {
                "ranks": count,
                "seconds": {
                    str(size): _time_of_sum(size, group, place) for size in dict.fromkeys(sizes)
                },
            }
    return {"device": device_name(grid.device), "seconds": seconds, "per_node": place.per_node}


def _time_of_sum(size: int, group: dist.ProcessGroup | None, place: Place) -> float:
    """Median of a few, of so many bytes in fp32."""
    numbers = torch.zeros(size // 4, device=place.grid.device)
    times = []
    for repetition in range(7):
        _wait(place)
        began = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        _wait(place)
        if repetition >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(place: Place) -> None:
    if place.on_gpu:
        torch.cuda.synchronize()


def judge_bandwidth(checklist: Checklist, found: dict[str, list[Any]]) -> None:
    """The slowest rank's times, and the largest sum beside the data sheet."""
    ranks = found["bandwidth"]
    accelerator = accelerator_of(ranks[0]["device"])
    for name, of_first in ranks[0]["seconds"].items():
        count = of_first["ranks"]
        speeds = {}
        for size in of_first["seconds"]:
            slowest = max(rank["seconds"][name]["seconds"][size] for rank in ranks)
            speeds[int(size)] = slowest, 2 * (count - 1) / count * int(size) / slowest
        for size, (seconds, speed) in speeds.items():
            checklist.rows.append(
                (
                    f"sum over {name}",
                    f"{count}",
                    f"{size:,}",
                    f"{1e6 * seconds:,.0f}",
                    f"{speed / 1e9:.2f}",
                )
            )
        _, largest = speeds[max(speeds)]
        sheet = None
        if accelerator is not None:
            inside = name == "a node"
            sheet = accelerator.node_bandwidth if inside else accelerator.network_bandwidth
        least = _LEAST_SHARE * sheet if sheet else 0.0
        expected = f"at least {least / 1e9:.1f} GB/s" if sheet else "no data sheet"
        checklist.note(
            f"sum over {name}, {max(speeds):,} bytes",
            f"{largest / 1e9:.2f} GB/s",
            expected,
            largest >= least,
        )


# -- what ranks agree on beside a step ------------------------------------------------------------


def measure_agreement(place: Place) -> float:
    """Median seconds of an agreement of all ranks on the CPU."""
    times = []
    for _ in range(50):
        began = time.perf_counter()
        all_reduce_max([0, 0], place.grid)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def judge_agreement(checklist: Checklist, found: dict[str, list[Any]]) -> None:
    """It runs beside a step, and must not outlast one."""
    slowest = max(found["agreement"])
    soon = slowest < _SLOWEST_AGREEMENT or not checklist.on_gpu  # a busy CPU may take any time
    limit = f"below {1e3 * _SLOWEST_AGREEMENT:.0f} ms"
    checklist.note("agreement of all ranks", f"{1e3 * slowest:.1f} ms", limit, soon)


# -- whether training over nodes is training ------------------------------------------------------


def measure_losses(place: Place) -> dict[str, list[float]]:
    """Losses of a few steps in fp32 on the same batches, over whatever ranks take part; and that
    ranks hold the same weights afterwards.
    """
    losses = {"data-parallel": _losses(place, place.grid)}
    if place.per_node % 2 == 0:
        losses["tensor-parallel over 2"] = _losses(place, ProcessGrid.create(2, place.grid.device))
    return losses


def _losses(place: Place, grid: ProcessGrid) -> list[float]:
    from megaegpt.training.engine.engine import Engine

    width = 256 if place.on_gpu else 32
    batch = math.lcm(64, place.all_ranks)  # the same for one node, and every rank has some of it
    model = ModelConfig(
        vocab_size=500, max_seq_len=width, hidden_size=width, num_layers=2, num_heads=4
    )
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(tensor_parallel_size=grid.tp_size, zero_stage=1),
        training=TrainingConfig(
            steps=_STEPS, global_batch_size=batch, micro_batch_size=1, precision="fp32"
        ),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0),
    )
    engine = Engine(build_model(model, grid), grid, config)
    losses = []
    for step in range(_STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(500, (batch, width + 1), generator=generator)
        own = ids[grid.dp_rank :: grid.dp_size].to(grid.device)
        rows = [{"tokens": x[None, :-1], "targets": x[None, 1:].contiguous()} for x in own]
        losses.append(engine.train_step(step, rows).loss.item())
    engine.assert_replicas_equal()
    engine.close()
    return losses


def judge_losses(checklist: Checklist, found: dict[str, list[Any]]) -> None:
    """All ranks beside those of the first node."""
    alone = found["losses of one node"][0]
    for name, expected in alone.items():
        losses = found["losses"][0][name]
        difference = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        checklist.note(
            f"losses over all nodes, {name}, beside one node's",
            f"{difference:.1e} apart at most",
            f"below {_LOSS_TOLERANCE:.0e}",
            difference < _LOSS_TOLERANCE,
        )


def judge_nothing(checklist: Checklist, found: dict[str, list[Any]]) -> None:
    """What another part is compared with."""


# -- how much of the speed is left ----------------------------------------------------------------


def measure_speed(place: Place) -> float:
    """Tokens a second and rank in training GPT-2 124M: median of some steps."""
    from tools.benchmarks import train

    rows, context = (32, 1024) if place.on_gpu else (1, 8)
    shape = train.SHAPES["124M" if place.on_gpu else "small"]
    sizes = shape | {
        "context": context,
        "batch": rows * place.grid.world_size,
        "vocab": train.VOCAB,
    }
    options = {"zero": 1, "precision": "auto", "recompute": "none", "compile": place.on_gpu}
    work = train.ours(sizes, options)
    times = []
    for repetition in range(13 if place.on_gpu else 3):
        _wait(place)
        began = time.perf_counter()
        work.run()
        _wait(place)
        if repetition >= 3 or not place.on_gpu:
            times.append(time.perf_counter() - began)
    return rows * context / statistics.median(times)


def judge_speed(checklist: Checklist, found: dict[str, list[Any]]) -> None:
    """The slowest rank over all nodes, beside the first node alone."""
    together, alone = min(found["speed"]), min(found["speed of one node"])
    holds = together >= _LEAST_SCALING * alone or not checklist.on_gpu
    checklist.note(
        "training GPT-2 124M over all nodes, tokens/s a GPU",
        f"{together:,.0f}, {together / alone:.2f} of one node's {alone:,.0f}",
        f"at least {_LEAST_SCALING:.2f}",
        holds,
    )


def all_parts() -> Sequence[Part]:
    """In the order in which they run: checks first."""
    return (
        Part("groups", measure_groups, judge_groups, 3),
        Part("bandwidth", measure_bandwidth, judge_bandwidth, 4),
        Part("agreement", measure_agreement, judge_agreement, 2),
        Part("losses of one node", measure_losses, judge_nothing, 4, one_node=True),
        Part("losses", measure_losses, judge_losses, 4),
        Part("speed of one node", measure_speed, judge_nothing, 6, one_node=True),
        Part("speed", measure_speed, judge_speed, 6),
    )
