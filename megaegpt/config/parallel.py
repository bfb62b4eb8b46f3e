"""How a run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megaegpt.config.ranges import PositiveInt

if TYPE_CHECKING:  # a configuration needs no torch
    from megaegpt.precision import Precision


@dataclass(frozen=True)
class ParallelConfig:
    """Tensor and context parallelism and ZeRO; the data-parallel size is the number of processes /
    (TP x CP)."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that share one copy of the model; neighbours, best inside one node."""
    sequence_parallel: bool = False
    """Cut norms, dropout and residuals over the ranks of a tensor-parallel group by tokens, so that
    each keeps its part of these activations (see ``parallel.sequence``). No effect where
    ``tensor_parallel_size`` is 1. Not on by itself: gradients of norms are then sums of parts and
    round otherwise, so that a run begun without it would not go on bit for bit."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of their samples, each with a part of every sequence, or of the
    chunks of every window."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates (in half precision as 1), 1 shards optimizer states, 2 also
    shards gradients, 3 also shards parameters, which are gathered layer by layer as forward and
    backward pass need them."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO stage 3 keeps in host memory: with ``optimizer``, moments and fp32 weights, which
    the CPU updates there; with ``parameters``, also the parts of the weights that a GPU computes
    with, which it fetches layer by layer."""
    overlap_comm: bool = False
    """Overlap ZeRO's gradient reduction with the backward pass, in two buckets of 25 million
    gradients; a model that fits into one has nothing to overlap."""

    @property
    def ranks_of_a_sample(self) -> int:
        """TP x CP: the least number of processes, of which each works on the same samples."""
        return self.tensor_parallel_size * self.context_parallel_size


def effective_zero_stage(stage: int, precision: Precision) -> int:
    """The stage DeepSpeed is given.

    Half precision needs fp32 master weights, which DeepSpeed's stage 0 keeps in an optimizer that
    counts sharded gradients wrongly under tensor parallelism and accumulates in half precision.
    Stage 1 costs the same communication and less memory, so it serves for 0 there.
    """
    return max(stage, 1) if precision != "fp32" else stage
