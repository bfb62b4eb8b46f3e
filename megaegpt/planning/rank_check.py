"""Whether all ranks of a run do the same, without starting it.

Ranks wait for each other in collectives: where one of them leaves out a collective, makes it in
another order or with another shape, the run hangs or sums what does not belong together. So single
ranks of a grid of any size are played here in one process, by torch's ``fake`` process group, which
knows its rank and sends nothing, and by tensors that have no memory; their collectives are written
down and compared. Played is the model's forward and backward pass. DeepSpeed's own collectives are
not: it reads values, which such tensors do not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.model.build import empty_model
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import spec_of
from megaegpt.planning.memory_trace import trace_micro_step
from megaegpt.precision import Precision


@dataclass(frozen=True)
class Collective:
    """One call, as every rank of its group has to make it."""

    operator: str
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shapes and types of its arguments and results."""
    group: tuple[int, ...]
    """Its ranks."""

    @property
    def role(self) -> Collective:
        """The same with the place of each rank in the group instead of its number, which is what
        ranks of other groups share.
        """
        first = self.group[0] if self.group else 0
        return dataclasses.replace(self, group=tuple(rank - first for rank in self.group))

    def __str__(self) -> str:
        shapes = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in self.tensors)
        stride = self.group[1] - self.group[0] if len(self.group) > 1 else 1
        return f"{self.operator}({shapes}) over {len(self.group)} ranks, {stride} apart"


class CollectiveRecorder(TorchDispatchMode):
    """Writes down the collectives of this process while it is active, those of DeepSpeed too where
    it runs on real tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Write the operator down if it is a collective of more than one rank, and run it."""
        if func.namespace == "c10d":
            ranks = _ranks(args)
            if len(ranks) > 1:
                leaves = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
                tensors = tuple((tuple(x.shape), x.dtype) for x in leaves)
                self.calls.append(Collective(func.overloadpacket.__name__, tensors, ranks))
        return func(*args, **(kwargs or {}))


def _ranks(args: Sequence[Any]) -> tuple[int, ...]:
    """Global ranks of the process group among an operator's arguments."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            with contextlib.suppress(RuntimeError):  # the kind of sum is such an object, too
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
    return ()


@dataclass(frozen=True)
class RankRecord:
    """What one rank has and calls."""

    rank: int
    shapes: Mapping[str, tuple[int, ...]]
    """Of its parameters."""
    whole_shapes: Mapping[str, tuple[int, ...]]
    """Of the same, as they should be here by their marks: cut along the marked dimension."""
    calls: Sequence[Collective]


@contextlib.contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be one of so many ranks, none of which is there: collectives return at once and leave their
    results as they were. The default process group must not exist.
    """
    from torch.distributed._tools import fake_collectives  # noqa: F401 (they take fake tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group

    def new_fake_group(ranks: list[int] | None = None, **options: Any) -> Any:
        return new_group(ranks, **(options | {"backend": "fake"}))

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with mock.patch.object(dist, "new_group", new_fake_group):
            yield
    finally:
        dist.destroy_process_group()


def record_rank(
    config: RunConfig,
    rank: int,
    world_size: int,
    precision: Precision,
    encoder: ModelConfig | None = None,
) -> RankRecord:
    """Build a rank's model, and play a micro-step of it.

    Args:
        encoder: the frozen GPT under egpt and deepgpt; None: it is left out.
    """
    with as_rank(rank, world_size):
        parallel = config.parallel
        grid = ProcessGrid.create(
            parallel.tensor_parallel_size, cp_size=parallel.context_parallel_size
        )
        with FakeTensorMode():
            model = empty_model(config.model, grid)
        shapes, wanted = {}, {}
        for name, parameter in model.named_parameters():
            spec = spec_of(parameter)
            shape = list(spec.full_shape)
            if spec.tp_dim is not None:
                shape[spec.tp_dim] //= grid.tp_size
            shapes[name], wanted[name] = tuple(parameter.shape), tuple(shape)
        recorder = CollectiveRecorder()
        trace_micro_step(config, precision, encoder, "cuda", True, observed_by=recorder, grid=grid)
    return RankRecord(rank, shapes, wanted, recorder.calls)


def find_differences(records: Sequence[RankRecord]) -> list[str]:
    """What keeps ranks from running together, a line each; empty: nothing does."""
    found = []
    first = records[0]
    for record in records:
        name = f"rank {record.rank}"
        for parameter, shape in record.shapes.items():
            if shape != record.whole_shapes[parameter]:
                due = list(record.whole_shapes[parameter])
                found.append(f"{name}: {parameter} is {list(shape)}, and should be {due}")
        if record.shapes != first.shapes:
            names = {n for n in {**record.shapes, **first.shapes} if _differs(record, first, n)}
            found.append(f"{name}: unlike rank {first.rank} in {', '.join(sorted(names))}")
        found += [
            f"{name}: calls {call} without being one of {list(call.group)}"
            for call in record.calls
            if record.rank not in call.group
        ]
        found += _first_other_call(record, first)
    return found


def _differs(record: RankRecord, other: RankRecord, parameter: str) -> bool:
    return record.shapes.get(parameter) != other.shapes.get(parameter)


def _first_other_call(record: RankRecord, first: RankRecord) -> list[str]:
    """Where the two part, if they do."""
    for number, (own, other) in enumerate(zip(record.calls, first.calls, strict=False)):
        if own.role != other.role:
            return [
                f"rank {record.rank}: collective {number} is {own}, on rank {first.rank} it is "
                f"{other}"
            ]
    if len(record.calls) != len(first.calls):
        counts = f"{len(record.calls)} collectives, rank {first.rank} {len(first.calls)}"
        return [f"rank {record.rank}: makes {counts}: the longer of them waits for ever"]
    return []


def choose_ranks(world_size: int, group: int, count: int) -> list[int]:
    """Some ``count`` ranks of a grid: the first ``group``, which share a sample, the last rank, and
    others spread evenly.
    """
    if count >= world_size:
        return list(range(world_size))
    chosen = {world_size - 1, *range(group)}
    others = max(0, count - len(chosen))
    chosen.update((i + 1) * world_size // (others + 1) for i in range(others))
    return sorted(chosen)
