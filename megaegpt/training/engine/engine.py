"""DeepSpeed behind one class: the optimizer step, and saved state.

Tested with 0.19.8; ``setup.py`` pins the line, because defaults move between releases. What is used
of it that it does not promise is listed in ``compat.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megaegpt.training.accelerator  # noqa: F401, before DeepSpeed

# isort: split
import deepspeed

from megaegpt.config.deepspeed_config import deepspeed_config
from megaegpt.config.parallel import effective_zero_stage
from megaegpt.config.run import RunConfig
from megaegpt.data.tokens.batch import Batch
from megaegpt.labels import IGNORE
from megaegpt.model.head import OutputHead
from megaegpt.parallel.grid import DeepSpeedMpu, ProcessGrid
from megaegpt.parallel.params import ParamSpec, marked_vectors, spec_of
from megaegpt.parallel.rng import seed_micro_step
from megaegpt.parallel.together import all_gather_object, raising_together
from megaegpt.precision import DTYPES, resolve_precision
from megaegpt.training.checkpoint import deepspeed_state
from megaegpt.training.checkpoint.host_copies import HostCopies
from megaegpt.training.checkpoint.manifest import Topology
from megaegpt.training.checkpoint.universal import convert, set_group_count
from megaegpt.training.engine.compat import (
    check_accepted,
    check_compatible,
    import_muon_uncompiled,
    naming_raw_keys,
    piece_of,
    quieten,
)
from megaegpt.training.engine.fewer_operators import use_fewer_operators
from megaegpt.training.engine.gradients import ModuleNorms
from megaegpt.training.engine.host_memory import keep_freed_memory
from megaegpt.training.engine.muon import Muon
from megaegpt.training.engine.optimizer import LR_SCALE, build_optimizer
from megaegpt.training.engine.replicas import assert_replicas_equal, is_sharded
from megaegpt.training.engine.schedule import learning_rate
from megaegpt.training.engine.spikes import SpikeGuard
from megaegpt.training.engine.stage_3 import hide_gathers, partition, without_hooks

LossFunction = Callable[[Callable[..., Tensor], Batch], Tensor]
"""(model, micro-batch) -> the sum of its losses in nats, through one call of the model; on a
context-parallel rank, of its own tokens."""


def call_model(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The loss of a micro-batch that holds just what the model is called with."""
    return model(**batch)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Tensors are scalars on the device, equal on all ranks."""

    loss: Tensor
    """Mean nats per token over the global batch, before the update."""
    tokens: Tensor
    """Predicted tokens of the global batch."""
    grad_norm: Tensor
    """Global gradient norm before clipping; inf where it was not finite."""
    lr: float
    """Learning rate of this step."""
    applied: bool
    """False: the gradient was not finite, or a spike, and the weights are unchanged."""
    nonfinite: bool
    """Skipped for a cause that loss scaling does not cure."""
    micro_losses: tuple[Tensor, ...] = ()
    """Sum of nats of this rank's tokens of each of its micro-batches."""
    module_norms: Tensor | None = None
    """Gradient norms of ``Engine.module_norms.names``; None unless ``logging.gradient_norms``."""
    spike: float | None = None
    """Skipped by ``training.spike_guard``: the median that the norm stands out from."""


class Engine:
    """A model under DeepSpeed: ZeRO, mixed precision, clipping, AdamW or Muon.

    Args:
        model: the trainable model with its initial weights and :class:`ParamSpec` marks; it is
            moved to the grid's device and cast in place, and at ZeRO stage 3 cut over the ranks.
            Anything frozen stays outside.
        grid: this process's place; the process groups must exist (``parallel.launch``).
        config: the run.
        loss_function: how the model is called on a micro-batch.

    Raises:
        ConfigError: a precision that the device lacks, a pattern of ``optimizer.groups`` that
            matches no parameter, or raw keys that DeepSpeed refuses.
        LaunchError: a release of DeepSpeed that lacks what is used of it.
    """

    def __init__(
        self,
        model: nn.Module,
        grid: ProcessGrid,
        config: RunConfig,
        loss_function: LossFunction = call_model,
    ) -> None:
        self.model = model
        self.grid = grid
        self._loss_function = loss_function
        self._heads = [part for part in model.modules() if isinstance(part, OutputHead)]
        self.precision = resolve_precision(config.training.precision, grid.device)
        if grid.device.type == "cpu":
            keep_freed_memory()
        stage = effective_zero_stage(config.parallel.zero_stage, self.precision)
        self.topology = Topology(
            grid.tp_size,
            grid.replica_size,
            stage,
            self.precision,
            [group.match for group in config.optimizer.groups],
            marked_vectors(model),
        )
        self._config = config
        for parameter in model.parameters():
            # DeepSpeed counts the gradients of unmarked parameters on TP rank 0 only.
            setattr(parameter, "tensor_model_parallel", is_sharded(parameter, grid))  # noqa: B010
        if stage < 3:
            model.to(grid.device)
        clipping = config.training.gradient_clipping if stage == 0 else None
        with raising_together(grid):
            optimizer = build_optimizer(model, config.optimizer, grid, clipping)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        options = deepspeed_config(config, grid.dp_size, self.precision, trainable)
        check_accepted(options)
        quieten(grid.device.type)
        import_muon_uncompiled()
        mpu = DeepSpeedMpu(grid)
        with contextlib.redirect_stdout(None), naming_raw_keys(config.deepspeed):
            # Its optimizers print memory figures.
            if stage == 3:
                partition(model, DTYPES[self.precision], mpu, options)
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, mpu=mpu, config=options
            )
        check_compatible(self._deepspeed, stage, self.precision)
        if stage == 3:
            hide_gathers(self._deepspeed)
        if isinstance(optimizer, Muon) and stage:
            pieces = all_gather_object([piece_of(p) for p in optimizer.matrices], grid)
            optimizer.follow_partition(pieces[grid.tp_rank :: grid.tp_size])
        use_fewer_operators(self.optimizer, grid)
        if self.precision == "fp16" and self._loss_scaler is not None:
            # DeepSpeed would end the run with a bare Exception; train_step reports it instead.
            self._loss_scaler.raise_error_at_min_scale = False
        if stage == 0 and grid.replica_size == 1:
            # Nothing is to be averaged: it would copy all gradients to one buffer and back.
            self._deepspeed.enable_backward_allreduce = False
        deepspeed_state.install(self._deepspeed)
        self.module_norms = ModuleNorms(model, self.optimizer, grid)
        self.spike_guard = SpikeGuard(config.training.spike_guard)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer; ``param_groups`` hold learning rate, betas and weight decay."""
        return self._deepspeed.optimizer

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1 unless the precision is fp16."""
        return 1.0 if self._loss_scaler is None else float(self._loss_scaler.cur_scale)

    @property
    def _loss_scaler(self) -> Any:
        return getattr(self.optimizer, "loss_scaler", None)

    def parameter_specs(self) -> dict[str, ParamSpec]:
        """The spec of every trainable parameter by name."""
        return {n: spec_of(p) for n, p in self.model.named_parameters() if p.requires_grad}

    # -- training ---------------------------------------------------------------------------------

    def train_step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Optimizer step ``step`` (counted from 0) over this rank's micro-batches, which are on its
        device. Collective. Context-parallel ranks are given the same samples whole, and the loss
        function computes the nats of this rank's tokens of them.

        The gradient is that of (nats of the global batch) / (predicted tokens of the global batch),
        however unevenly the tokens lie over ranks and micro-batches; without any, loss and gradient
        are 0.
        """
        lr = learning_rate(step, self._config.optimizer, self._config.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get(LR_SCALE, 1.0)
        tokens = self._count_tokens(micro_batches)
        divisor = tokens.clamp(min=1)
        scale = self.grid.replica_size / divisor  # DeepSpeed averages over replicas
        for head in self._heads:
            head.expect_backward_scale(scale * self.loss_scale)  # which changes between steps only
        norms, spike, losses = None, None, []
        seed = self._config.training.seed
        for micro_step, micro_batch in enumerate(micro_batches):
            seed_micro_step(seed, step, micro_step, self.grid.dp_rank)
            last = micro_step + 1 == len(micro_batches)
            self._deepspeed.set_gradient_accumulation_boundary(last)
            loss = self._loss_function(self._deepspeed, micro_batch)
            self._deepspeed.backward(loss * scale, scale_wrt_gas=False)
            if last and self._config.logging.measures_parts(step):
                norms = self.module_norms.measure(self.loss_scale)
            if last and self.spike_guard.is_on:
                spike = self._find_spike()
            with self._loss_scale_kept(spike is not None):
                self._deepspeed.step()
            losses.append(loss.detach())
        total = torch.zeros((), device=self.grid.device)
        for loss in losses:
            total += loss
        if self.grid.replica_group is not None:
            dist.all_reduce(total, group=self.grid.replica_group)
        result = self._result(total / divisor, tokens, lr, tuple(losses), norms)
        if spike is None:
            return result
        norm, median = spike
        norm_of_spike = torch.full_like(result.grad_norm, norm)
        return replace(result, grad_norm=norm_of_spike, nonfinite=False, spike=median)

    def _find_spike(self) -> tuple[float, float] | None:
        """The norm of a gradient that stands out, and the median that it stands out from; such a
        gradient is spoilt, for DeepSpeed leaves out the update of one that is not finite.
        Collective, and decided alike on all ranks.
        """
        median = self.spike_guard.median
        norm = self.module_norms.total(self.loss_scale).item()
        if not self.spike_guard.is_spike(norm):
            return None
        self.module_norms.spoil()
        return norm, median

    @contextlib.contextmanager
    def _loss_scale_kept(self, kept: bool) -> Iterator[None]:
        """Keep a step that is left out on purpose from lowering the loss scale of fp16."""
        scaler = self._loss_scaler if kept else None
        before = {} if scaler is None else dict(vars(scaler))
        yield
        if scaler is not None:
            vars(scaler).update(before)

    def _count_tokens(self, micro_batches: Sequence[Batch]) -> Tensor:
        counts = [(batch["targets"] != IGNORE).sum() for batch in micro_batches]
        tokens = torch.stack(counts).sum()
        if self.grid.dp_group is not None:
            dist.all_reduce(tokens, group=self.grid.dp_group)
        return tokens

    def _result(
        self,
        loss: Tensor,
        tokens: Tensor,
        lr: float,
        micro_losses: tuple[Tensor, ...],
        norms: Tensor | None,
    ) -> StepResult:
        applied = self._deepspeed.was_step_applied()
        norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32)
        nonfinite = False
        if not applied:
            norm = torch.full_like(norm, torch.inf)
            scaler = self._loss_scaler if self.precision == "fp16" else None
            at_minimum = scaler is None or scaler.cur_scale <= scaler.min_scale
            nonfinite = at_minimum or not bool(torch.isfinite(loss))
        norm = norm.to(loss.device)
        return StepResult(loss, tokens, norm, lr, applied, nonfinite, micro_losses, norms)

    def whole_model(self) -> contextlib.AbstractContextManager[None]:
        """Have all parameters on this rank, for passes by which ranks do not go together, such as
        those that generate texts. Collective at the beginning.
        """
        if self.topology.zero_stage < 3:
            return contextlib.nullcontext()
        return without_hooks(self._deepspeed)

    # -- state ------------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> list[Path]:
        """Write weights and optimizer state under ``folder``; collective, but for the writing,
        which other ranks may be at still.

        Returns:
            The files that this rank wrote.

        Raises:
            OSError: writing failed on this rank; every rank has left the collective part by then.
        """
        return deepspeed_state.save(self._deepspeed, folder, self.parameter_specs())

    def copy_state(self, folder: Path, copies: HostCopies) -> Callable[[], list[Path]]:
        """Copy what :meth:`save_state` would write; collective.

        Returns:
            What writes the copies under ``folder``, in whatever thread, and gives this rank's
            files. It raises :class:`OSError` if it cannot.
        """
        return deepspeed_state.copy_state(self._deepspeed, folder, self.parameter_specs(), copies)

    def load_state(self, folder: Path) -> None:
        """Restore what :meth:`save_state` wrote under the same topology. Collective.

        Raises:
            CheckpointError: the files do not fit this model, on some rank: raised on every one.
        """
        with raising_together(self.grid):
            deepspeed_state.load(self._deepspeed, folder)

    def load_reshaped(self, folder: Path, saved: Topology, scratch: Path) -> None:
        """Restore what :meth:`save_state` wrote under the topology ``saved``. Collective.

        Goes through DeepSpeed's universal checkpoint, made in ``scratch``: a folder that the main
        rank makes and every rank sees, and that the caller removes.

        Raises:
            CheckpointError: the files do not fit this model, or there is no room for ``scratch``,
                on some rank: raised on every one.
        """
        universal = scratch / "universal"
        shapes = {name: spec.full_shape for name, spec in self.parameter_specs().items()}
        with raising_together(self.grid):
            if self.grid.is_main:
                deepspeed_state.make_scratch(scratch, folder)
                with deepspeed_state.loading(folder):
                    convert(folder, universal, shapes, saved.zero_stage)
                    set_group_count(universal, len(self.optimizer.param_groups))
        deepspeed_state.load_universal(self._deepspeed, universal, self.grid)

    def assert_replicas_equal(self) -> None:
        """Check bit for bit that ranks which hold the same parameter agree. Collective.

        Raises:
            AssertionError: on every rank; names the first parameter that differs anywhere.
        """
        assert_replicas_equal(self.model, self.grid)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self._deepspeed.destroy()
