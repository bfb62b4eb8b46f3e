"""The layout of each parameter under tensor parallelism: the one source for initialisation,
DeepSpeed's marks, the gradient norm, checkpoint reshaping and weight export.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.partitions import gathered
from megaegpt.parallel.rng import derive_seed

_ATTRIBUTE = "tp_spec"


@dataclass(frozen=True)
class ParamSpec:
    """The full, TP-independent tensor behind a parameter and how this rank's slice is cut from
    it.
    """

    full_shape: tuple[int, ...]
    """Shape at tensor_parallel_size=1."""
    tp_dim: int | None = None
    """Dimension cut into equal contiguous slices over TP ranks; None: every rank holds all of
    it.
    """
    init_std: float = 0.0
    """Standard deviation of the normal initial values around ``init_mean``; 0: constant."""
    init_mean: float | tuple[float, ...] = 0.0
    """Mean of the initial values (1 for LayerNorm weights); several are those of the columns."""
    vocab_rows: int | None = None
    """For vocabulary matrices: real tokens; the rows from here on are padding and start (and stay)
    0.
    """
    vectors: bool = False
    """Whether its rows are vectors of their own, as biases are, and no matrix of weights."""


def mark(parameter: nn.Parameter, spec: ParamSpec) -> nn.Parameter:
    """Attach ``spec`` to ``parameter`` and return it."""
    setattr(parameter, _ATTRIBUTE, spec)
    return parameter


def spec_of(parameter: Tensor) -> ParamSpec:
    """The spec attached by :func:`mark`."""
    return getattr(parameter, _ATTRIBUTE)


def is_vector(parameter: Tensor) -> bool:
    """Whether a parameter is one or more vectors, on which no weight decay acts; one without a spec
    is by its dimensions.
    """
    spec: ParamSpec | None = getattr(parameter, _ATTRIBUTE, None)
    return parameter.dim() < 2 or (spec is not None and spec.vectors)


def new_parameter(
    full_shape: tuple[int, ...],
    grid: ProcessGrid,
    *,
    tp_dim: int | None = None,
    std: float = 0.0,
    mean: float | tuple[float, ...] = 0.0,
    vocab_rows: int | None = None,
    vectors: bool = False,
) -> nn.Parameter:
    """An uninitialised parameter of this rank's shape with its spec (see :func:`initialize`)."""
    local_shape = list(full_shape)
    if tp_dim is not None:
        if full_shape[tp_dim] % grid.tp_size:
            raise ValueError(
                f"dimension {tp_dim} of {full_shape} is not divisible by {grid.tp_size}"
            )
        local_shape[tp_dim] //= grid.tp_size
    spec = ParamSpec(tuple(full_shape), tp_dim, std, mean, vocab_rows, vectors)
    return mark(nn.Parameter(torch.empty(local_shape)), spec)


def shard(full: Tensor, spec: ParamSpec, grid: ProcessGrid) -> Tensor:
    """This rank's slice (a view) of a full tensor."""
    if spec.tp_dim is None:
        return full
    size = spec.full_shape[spec.tp_dim] // grid.tp_size
    return full.narrow(spec.tp_dim, grid.tp_rank * size, size)


def unshard(local: Tensor, spec: ParamSpec, grid: ProcessGrid) -> Tensor:
    """The full tensor behind a slice, on every TP rank; collective over the TP group."""
    local = local.detach()
    if spec.tp_dim is None or grid.tp_group is None:
        return local
    local = local.contiguous()
    parts = [torch.empty_like(local) for _ in range(grid.tp_size)]
    dist.all_gather(parts, local, group=grid.tp_group)
    return torch.cat(parts, dim=spec.tp_dim)


def full_state(model: nn.Module, grid: ProcessGrid) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of every parameter in order, tied ones once; collective over the TP
    group, and over all ranks where ZeRO stage 3 has cut parameters.
    """
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            full = unshard(parameter, spec_of(parameter), grid)
        yield name, full


def initialize(model: nn.Module, seed: int, grid: ProcessGrid) -> None:
    """Draw every parameter from (seed, its name): the same full weights at any TP size or layer
    order.
    """
    for name, parameter in model.named_parameters():
        initialize_parameter(parameter, name, seed, grid)


def initialize_parameter(parameter: nn.Parameter, name: str, seed: int, grid: ProcessGrid) -> None:
    """Draw one parameter from (seed, its name in the model)."""
    spec = spec_of(parameter)
    mean = torch.tensor(spec.init_mean, dtype=torch.float32)
    full = mean.expand(spec.full_shape).clone(memory_format=torch.contiguous_format)
    if spec.init_std:
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        full.normal_(0.0, spec.init_std, generator=generator).add_(mean)
    if spec.vocab_rows is not None:
        full[spec.vocab_rows :] = 0
    with torch.no_grad():
        parameter.copy_(shard(full, spec, grid))


def marked_vectors(model: nn.Module) -> list[str]:
    """The trainable parameters of several rows that are vectors, by name."""
    trainable = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [name for name, p in trainable if p.dim() > 1 and is_vector(p)]


def count_parameters(model: nn.Module) -> int:
    """Elements of the full parameters behind a model, whatever the TP size; tied ones once."""
    return sum(math.prod(spec_of(parameter).full_shape) for parameter in model.parameters())
