"""The optimizer of a run: AdamW, or Muon with it, and clipping where DeepSpeed leaves it to us."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megaegpt.config.parameter_groups import ParameterGroup, assign_groups
from megaegpt.config.training import OptimizerConfig
from megaegpt.model.parts import matrices_of
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import is_vector, marked_vectors
from megaegpt.training.engine.muon import Muon
from megaegpt.training.engine.norms import in_pieces
from megaegpt.training.engine.replicas import is_counted

LR_SCALE = "lr_scale"
"""Key of a parameter group: the factor of its learning rate, where it is not 1."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters in groups of one learning rate and weight decay.

    Of each entry of ``optimizer.groups``, and of the parameters that none of them matches, there
    are up to three: Muon's matrices, other matrices and embeddings, and vectors (biases, norms,
    what a token memory adds to scores and gates), which decay only if their entry says so. Groups
    of Muon and of entries, and those of models with rows of vectors, have the names of their
    parameters, from which a checkpoint of ZeRO stage 0 is read at another topology.

    Raises:
        ConfigError: an entry matches no parameter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = matrices_of(model) if config.kind == "muon" else {}
    entries = [*config.groups, ParameterGroup()]
    named = config.kind == "muon" or bool(config.groups or marked_vectors(model))
    groups = []
    for entry, names in zip(entries, assign_groups([*trainable], config.groups), strict=True):
        own = entry.weight_decay
        decay, of_vectors = (config.weight_decay, 0.0) if own is None else (own, own)
        tables = [n for n in names if n not in matrices and not is_vector(trainable[n])]
        vectors = [n for n in names if n not in matrices and is_vector(trainable[n])]
        for chosen, muon, weight_decay in (
            ([n for n in names if n in matrices], True, decay),
            (tables, False, decay),
            (vectors, False, of_vectors),
        ):
            if not chosen:
                continue
            params = [trainable[name] for name in chosen]
            group: dict[str, Any] = {"params": params, "weight_decay": weight_decay}
            if config.kind == "muon":
                group["muon"] = muon
            if config.groups:
                group[LR_SCALE] = entry.lr_scale
            if named:
                group["names"] = chosen
            groups.append(group)
    return groups


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, grid: ProcessGrid, clipping: float | None = None
) -> torch.optim.Optimizer:
    """What DeepSpeed is given: fused AdamW (one pass over memory: 3.6 times faster than the loop on
    a CPU), or Muon with it.

    Args:
        clipping: the largest norm of gradients for ZeRO stage 0 in fp32, where the optimizer clips
            them, and skips non-finite ones; None: DeepSpeed does.

    Raises:
        ConfigError: as for :func:`parameter_groups`.
    """
    arguments: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    groups = parameter_groups(model, config)
    optimizer: torch.optim.Optimizer
    if config.kind == "muon":
        kind = Muon if clipping is None else ClippedMuon
        optimizer = kind(groups, grid=grid, momentum=config.momentum, **arguments)
    else:
        optimizer = (torch.optim.AdamW if clipping is None else ClippedAdamW)(groups, **arguments)
    if isinstance(optimizer, Clipping):
        optimizer.clip_by(clipping or 0.0, grid)
    return optimizer


class Clipping(torch.optim.Optimizer):
    """Clips by the global norm, and does nothing on a non-finite one.

    DeepSpeed without ZeRO keeps the gradient norm to itself and would apply a non-finite step; it
    reads the outcome back from ``_global_grad_norm`` and ``overflow`` when its optimizer has them.
    """

    def clip_by(self, max_norm: float, grid: ProcessGrid) -> None:
        """Set the largest norm (0: any), before the first step."""
        self._max_norm, self._clipping_grid = max_norm, grid
        self._global_grad_norm = torch.zeros(())
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip the gradients in place, then update; ``overflow`` says that nothing was updated."""
        parameters = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = gradient_norm(parameters, self._clipping_grid)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self._max_norm > 0:
            factor = torch.clamp(self._max_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_([p.grad for p in parameters], factor)
        super().step(closure)


class ClippedAdamW(Clipping, torch.optim.AdamW):
    """AdamW that clips."""


class ClippedMuon(Clipping, Muon):
    """Muon that clips."""


def gradient_norm(parameters: Iterable[nn.Parameter], grid: ProcessGrid) -> torch.Tensor:
    """2-norm of the whole model's gradient, replicated parameters counted once; collective.

    Parameters carry ``tensor_model_parallel`` (see
    :class:`megaegpt.training.engine.engine.Engine`): true where this rank's slice is to be counted
    beside the other ranks'.
    """
    counted = [p.grad for p in parameters if p.grad is not None and is_counted(p, grid)]
    if counted:
        norms = torch._foreach_norm([*in_pieces(counted)])
        total = torch.stack(norms).double().square().sum()
    else:
        total = torch.zeros((), dtype=torch.float64, device=grid.device)
    if grid.tp_group is not None:
        dist.all_reduce(total, group=grid.tp_group)
    return total.sqrt().float()
